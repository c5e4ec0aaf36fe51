"""Uneven inputs: a rank that has run out of them still owns pieces, and updates them while the others go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.algorithms import JoinHook

if TYPE_CHECKING:
    from zeroadam.optimizer import ZeroAdam


class StepAlong(JoinHook):
    """Takes a step for every one that the others take, with the gradients that `reduce_scatter_hook` brought."""

    def __init__(self, optimizer: ZeroAdam, **options: Any) -> None:
        if not options.get("divide_by_initial_world_size", True):
            raise ValueError(
                "divide_by_initial_world_size=False is not supported: step() divides the gradients by the size of "
                "its process group"
            )
        self.optimizer = optimizer
        optimizer.reduction.in_join = True

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
        self.optimizer.reduction.in_join = False
