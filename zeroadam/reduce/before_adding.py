"""Calls before a backward of any kind brings a parameter its gradient."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class BeforeAdding:
    """Of the parameters that are watched, none of which it keeps alive.

    Args:
        call: gets the parameter, and the arguments with which it was first watched.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call
        self._watched = WeakTensorKeyDictionary()

    def watch(self, param: Tensor, *arguments: Any) -> None:
        if param not in self._watched:
            trained = param.requires_grad
            param.requires_grad_(True)  # one that is frozen takes no hook, and may be trained later
            self._watched[param] = param.register_hook(partial(self._run, weakref.ref(param), arguments))
            param.requires_grad_(trained)

    def _run(self, reference: "weakref.ref[Tensor]", arguments: tuple[Any, ...], _: Tensor) -> None:
        if (param := reference()) is not None:
            self.call(param, *arguments)
