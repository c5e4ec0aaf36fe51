"""Who has summed a gradient, and is it still what the sum was?

Gradients that live on their owner only must not be changed by code that believes that all ranks see the same, such as
clipping by this rank's norm. That would be wrong in silence, so it is noted what was written, and `step()` compares.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from zeroadam.optimizer import ZeroAdam


@dataclass
class Reduced:
    """What the hook last wrote to the gradients of one DDP bucket: where, which version, summed over whom."""

    storage: int
    version: int
    group_name: str
    lost: int = 0  # how many of its parameters another has taken over

    def still_in(self, grad: Tensor) -> bool:
        return grad.untyped_storage().data_ptr() == self.storage and grad._version == self.version


# Ownership depends on shape and W alone: an optimizer can step on what was reduced by a hook on another one.
HELD: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> weak reference to the ZeroAdam that holds it
REDUCED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> Reduced


def note(param: Tensor, reduced: Reduced) -> None:
    """Remember that the gradient is what the hook wrote last."""
    before: Reduced | None = REDUCED.get(param)
    if before is not None and before is not reduced:
        before.lost += 1
    REDUCED[param] = reduced


def summed_over(param: Tensor, process_group: dist.ProcessGroup) -> int:
    """By what to divide `param.grad` for the mean over the ranks: W if the hook has summed it, 1 if it is the mean.

    Raises:
        RuntimeError: the gradient is not what the hook made it, or was summed over another process group.
    """
    reduced: Reduced | None = REDUCED.get(param)
    if reduced is None or param.grad is None:
        return 1
    if reduced.group_name != process_group.group_name:
        raise RuntimeError(
            "gradients were summed over another process group than that of the optimizer that holds the parameters: "
            "register the hook with an optimizer of the same group"
        )
    if not reduced.still_in(param.grad):
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(param.shape)} was changed after reduce_scatter_hook summed "
            "it, which only its owner would notice: clip with optimizer.clip_grad_norm_(), not with "
            "torch.nn.utils.clip_grad_norm_(); scale with zeroadam.GradScaler; end accumulation with a backward "
            "outside of no_sync()"
        )
    return process_group.size() if param.dim() > 0 else 1


def accept_changes(params: Iterable[Tensor]) -> None:
    """Take the gradients as they are now for what the hook wrote; for changes that all ranks make alike."""
    for param in params:
        if param.grad is not None and param in REDUCED:
            REDUCED[param].version = param.grad._version


def mark_held(params: Iterable[Tensor], optimizer: "ZeroAdam") -> None:
    """Remember which optimizer holds the parameters, without keeping it alive."""
    for param in params:
        HELD[param] = weakref.ref(optimizer)


def holder_of(param: Tensor, process_group: dist.ProcessGroup | None = None) -> "ZeroAdam":
    """The optimizer that holds a parameter which reduce_scatter_hook is to reduce, over this group if there is one.

    Raises:
        RuntimeError: there is none.
    """
    holder: ZeroAdam | None = HELD[param]() if param in HELD else None
    if holder is None or process_group not in (None, holder.process_group):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} is reduced by reduce_scatter_hook, but no ZeroAdam of the same "
            "process group holds it: give all the model's trained parameters to such optimizers"
        )
    return holder
