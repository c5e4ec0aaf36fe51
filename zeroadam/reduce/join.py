"""Uneven inputs: a rank that has run out of them still owns pieces, and updates them while the others go on."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.algorithms import Joinable, JoinHook
from torch.utils.weak import WeakTensorKeyDictionary

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
        optimizer.reduction.enter_join(optimizer)

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
        self.fail, self.active = fail, False  # whether the last backward was in `Join`
        self.sums: dict[int, Tensor] = {}  # what the hook left in p.grad adds up to, by the id of the parameter
        self._guarded = WeakTensorKeyDictionary()  # the first parameter of each bucket

    def enter(self, buckets: Iterable[Sequence[Tensor]], owner: Owner) -> None:
        """Note the sums that are there when `Join` begins. buckets: their parameters."""
        self.sums.clear()
        for params in buckets:
            self.guard(params, owner)
            for param in params:
                reduced = reduced_of(param)
                if param.grad is not None and reduced is not None and reduced.still_in(param.grad):
                    self.sums[id(param)] = param.grad.sum()

    def note(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Note what a backward has left, if it was in `Join`."""
        if self.active:
            self.sums |= {id(param): grad.sum() for param, grad in zip(params, grads, strict=True)}

    def guard(self, params: Sequence[Tensor], owner: Owner) -> None:
        """From the next backward on, refuse one that would add to the sums of a bucket, if it is in `Join`."""

        def check(_: Tensor) -> None:  # before a gradient is added; also where DDP has moved them to another bucket
            sums = [(p.grad, self.sums.get(id(p))) for p in params] if in_join(owner) else []
            if any(g is not None and last is not None and last != 0 and g.sum() == last for g, last in sums):
                self.fail(
                    "in Join a backward would add to gradients of an earlier one, which ranks without inputs have no "
                    "more: call optimizer.zero_grad() after each step, and accumulate in model.no_sync()"
                )

        if params[0] not in self._guarded:
            self._guarded[params[0]] = params[0].register_hook(check)
