"""Gathers that go on during the next forward, in which each module waits for its own parameters only.

A module may read parameters of a child without calling it, as torch's MultiheadAttention and fused encoder layers do.
So a module's first forward waits for all parameters below it; the next ones not for those below children that it has
called every time, as they wait themselves. Modules behave otherwise in training, in evaluation and without gradients;
each of these has a first time of its own.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zeroadam._compat import current_graph_task_id
from zeroadam.gather.gathers import Gathers
from zeroadam.report import Meter


class ForwardGather:
    """Hooks on all modules of a model that finish gathers before something reads their parameters."""

    def __init__(self, gathers: Gathers | None = None) -> None:
        self.gathers = gathers or Gathers(Meter())
        # The modules whose forward is running, outermost first, and what each has called so far.
        self.running: list[tuple[nn.Module, set[nn.Module]]] = []
        # Of each module and mode: what it has called every time so far, and what it therefore reads itself.
        self.called: WeakKeyDictionary[nn.Module, dict[Mode, set[nn.Module]]] = WeakKeyDictionary()
        self.reads: WeakKeyDictionary[nn.Module, dict[Mode, list[Tensor]]] = WeakKeyDictionary()

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            module.register_forward_pre_hook(self.before)
            module.register_forward_hook(self.after, always_call=True)
            module.register_state_dict_pre_hook(self.before_state_dict)
            module.register_load_state_dict_pre_hook(self.before_state_dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        if _in_backward():  # of a checkpoint, which stops halfway
            return
        if self.running:
            self.running[-1][1].add(module)
        self.running.append((module, set()))
        if self.gathers.waiting:
            reads = self.reads.get(module, {}).get(_mode(module))
            self.gathers.finish_of(module.parameters() if reads is None else reads)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if _in_backward():
            return
        called, mode = self.running.pop()[1], _mode(module)
        before = self.called.setdefault(module, {}).get(mode)
        if before is None or not before <= called:
            self.called[module][mode] = called if before is None else before & called
            self.reads.setdefault(module, {})[mode] = list(_parameters(module, self.called[module][mode]))

    def before_state_dict(self, *args: Any) -> None:  # noqa: ARG002
        self.gathers.finish()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForwardGather":
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # a model that is pickled goes without
        return ForwardGather, ()


Mode = tuple[bool, bool]


def _mode(module: nn.Module) -> Mode:
    return module.training, torch.is_grad_enabled()


def _parameters(module: nn.Module, without: set[nn.Module]) -> Iterator[Tensor]:
    """Of a module and what is below it, except below some children."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if child not in without:
            yield from _parameters(child, without)


def _in_backward() -> bool:
    return current_graph_task_id() != -1
