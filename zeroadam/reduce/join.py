"""Uneven inputs: a rank that has run out of them still owns pieces, and updates them while the others go on."""

from typing import Any

from torch.distributed.algorithms import Joinable, JoinHook

from zeroadam.reduce.ownership import Owner


class StepAlong(JoinHook):
    """Takes a step for every one that the others take, with the gradients that `reduce_scatter_hook` brought."""

    def __init__(self, optimizer: Owner, **options: Any) -> None:
        if not options.get("divide_by_initial_world_size", True):
            raise ValueError(
                "divide_by_initial_world_size=False is not supported: step() divides the gradients by the size of "
                "its process group"
            )
        self.optimizer = optimizer

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
