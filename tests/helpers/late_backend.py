"""The collectives of a backend as NCCL has them: results are there after `wait()`, and nothing can be read before."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from zeroadam.transport import backend


def late(collective: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
    """in_place: whether the input is a part of the output, and stays there."""

    def start(output: Tensor, given: Tensor, group: Any, async_op: bool) -> SimpleNamespace:
        assert async_op
        result, sent = torch.empty_like(output), given.clone()
        work = collective(result, sent, group=group, async_op=True)
        output.fill_(float("nan"))
        if in_place:
            given.copy_(sent)

        def wait() -> None:
            work.wait()
            output.copy_(result)

        return SimpleNamespace(wait=wait)

    return start


def install() -> None:
    """For the process in which it is called."""
    backend.all_gather = late(backend.all_gather, in_place=True)
    backend.reduce_scatter = late(backend.reduce_scatter, in_place=False)
