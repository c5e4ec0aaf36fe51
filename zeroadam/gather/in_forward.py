"""Gathers that go on during the next forward: whoever reads a parameter of a module waits for it, and for no other.

`module.weight` looks into `module._parameters`, as does all else that goes through modules: `parameters()`,
`state_dict()`, `model.to()`, parametrizations and pruning, a parent that uses a child's weight without calling it. So
that dict is exchanged for one that finishes the gather of what it gives away. A hook does so before each module's
forward as well, for those that keep their parameters elsewhere besides, such as the flat weights of an RNN.
"""

import warnings
from collections.abc import ItemsView, Iterator, ValuesView
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam._compat import disable_dynamo
from zeroadam.gather.gathers import Gathers


class AwaitedParameters(dict[str, Any]):
    """`Module._parameters` whose values have arrived when they are read. In copies and pickles it is a plain dict."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.gathers: list[Gathers] = []  # of the optimizers that hold them

    def wait(self, *params: Any) -> None:
        for gathers in self.gathers:
            if gathers.waiting:
                gathers.finish_of(param for param in params if param is not None)

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        self.wait(param)
        return param

    def get(self, name: str, default: Any = None) -> Any:
        param = super().get(name, default)
        self.wait(param)
        return param

    def pop(self, name: str, *default: Any) -> Any:
        self.wait(*super().values())
        return super().pop(name, *default)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self.wait(*super().values())
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self.wait(*super().values())
        return super().items()

    def __iter__(self) -> Iterator[str]:  # as dict() and update() then read one value after the other, from here
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.copy(),)


def watch(model: nn.Module, gathers: Gathers) -> None:
    """Let all reads of parameters through the modules of a model wait for their gathers."""
    for module in model.modules():
        parameters = module._parameters
        if not isinstance(parameters, AwaitedParameters):
            module._parameters = parameters = AwaitedParameters(parameters)
            module.register_forward_pre_hook(_wait_for_own, prepend=True)
        parameters.gathers.append(gathers)


def warn_of_buffers(model: nn.Module) -> None:
    """Where the forward of a model waits for all gathers at its start, in the queue of the communicator."""
    if isinstance(model, DistributedDataParallel) and model.broadcast_buffers and list(model.module.buffers()):
        warnings.warn(
            "gather_in_forward() hides nothing: DistributedDataParallel sends the model's buffers before each forward, "
            "behind the gathers. Build it with forward_sync_buffers=False, in older torch broadcast_buffers=False, "
            "if they are the same on all ranks anyway, such as masks",
            stacklevel=3,
        )


@disable_dynamo
def _wait_for_own(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
    module._parameters.values()
