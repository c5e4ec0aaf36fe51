"""Uneven inputs: a rank that has run out of them still owns pieces, and updates them while the others go on."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.algorithms import Joinable, JoinHook

from zeroadam.reduce.before_adding import BeforeAdding
from zeroadam.reduce.float_sums import sum_of
from zeroadam.reduce.ownership import Owner, reduced_of


class StepAlong(JoinHook):
    """Takes a step for every one that the others take, with the gradients that `reduce_scatter_hook` brought."""

    def __init__(self, optimizer: Owner, **options: Any) -> None:
        if not options.get("divide_by_initial_world_size", True):
            raise ValueError(
                "divide_by_initial_world_size=False is not supported: step() divides the gradients by the size of "
                "its process group"
            )
        self.optimizer = optimizer
        optimizer.reduction.sums_in_join.enter(optimizer)

    def main_hook(self) -> None:
        """Called for every iteration of the others, after the model's own shadow of it."""
        if not self.optimizer.reduction.used:
            raise RuntimeError(
                "uneven inputs need reduce_scatter_hook, which brings the gradients of its pieces to a rank without "
                "inputs: model.register_comm_hook(optimizer, reduce_scatter_hook)"
            )
        gradients = self.optimizer.reduction.take_joined()
        if not gradients:  # the others accumulate in no_sync()
            return
        for param, gradient in gradients:
            param.grad = gradient
        self.optimizer.step()
        for param, _ in gradients:
            param.grad = None

    def post_hook(self, is_last_joiner: bool) -> None:  # noqa: ARG002
        Joinable.__init__(self.optimizer)  # type: ignore[arg-type]  # as it was outside of the context


def in_join(optimizer: Owner) -> bool:
    """Whether the optimizer is inside `Join([model, optimizer])`; raises if it comes first there."""
    if optimizer._join_config.enable and optimizer._join_config.is_first_joinable:
        raise ValueError("backward comes before step(), so the model comes first: Join([model, optimizer])")
    return bool(optimizer._join_config.enable)


def refuse_in_join(optimizer: Owner, what: str) -> None:
    """Raise for what the ranks without inputs would not take part in."""
    if in_join(optimizer):
        raise RuntimeError(
            f"{what} asks all ranks, but in Join those without inputs only follow backward and step(): give all ranks "
            "equally many batches"
        )


class SumsInJoin:
    """Refuses, in `Join`, a backward that would add to sums of an earlier one, to which ranks without inputs add none.

    Args:
        fail: raises RuntimeError with a message, here and on the other ranks.
    """

    def __init__(self, fail: Callable[[str], Any]) -> None:
        self.fail = fail
        self.owner: weakref.ref[Owner] | None = None  # the optimizer of the last backward, if that was in `Join`
        self._summed: set[int] = set()  # ids of the parameters whose gradients were summed and not looked at since
        self._before_adding = BeforeAdding(self._check)

    def enter(self, owner: Owner) -> None:
        """Note the sums that are there when `Join` begins."""
        self._summed.clear()
        self.owner = weakref.ref(owner)
        for param in [param for group in owner.param_groups for param in group["params"]]:
            reduced = reduced_of(param)
            if param.grad is not None and reduced is not None and reduced.still_in(param.grad):
                self.note([param])

    def note(self, params: Sequence[Tensor]) -> None:
        """Note which gradients a backward in `Join` has left as sums."""
        if self.owner is None:
            return
        self._summed.update(map(id, params))
        for param in params:
            self._before_adding.watch(param, self.owner)

    def _check(self, param: Tensor, owner_ref: "weakref.ref[Owner]") -> None:
        """Before a gradient is added to p.grad: it must have been zeroed since."""
        owner = owner_ref()
        if owner is None or id(param) not in self._summed or not in_join(owner):
            return
        total = sum_of(param)
        if param.grad is not None and (param.grad.any() or (total is not None and total.begun and total.total.any())):
            self.fail(
                "in Join a backward would add to gradients of an earlier one, which ranks without inputs have no "
                "more: call optimizer.zero_grad() after each step, and accumulate in model.no_sync()"
            )
        self._summed.discard(id(param))
