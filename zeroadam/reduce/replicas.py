"""Sums of hybrid sharding to which another backward adds.

After a backward the owner of a piece holds its sum over all ranks, in every replica. If all of them went on with it, it
would count once for each. So the first replica does, and the others empty their pieces before the next backward adds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zeroadam._compat import adds_to_grad
from zeroadam.layout.shard import shard
from zeroadam.reduce.before_adding import BeforeAdding
from zeroadam.reduce.ownership import reduced_of


class ReplicaSums:
    """Of a rank; nothing happens in the first replica.

    Args:
        process_group: the shard group.
        replica: which one this rank is in.
        fail: raises RuntimeError with a message, here and on the other ranks.
    """

    def __init__(self, process_group: Any, replica: int, fail: Callable[[str], Any]) -> None:
        self.rank, self.world_size, self.replica, self.fail = process_group.rank(), process_group.size(), replica, fail
        # Some values of each piece that is a sum over all ranks, by parameter. DDP may have copied the gradient to
        # another bucket when they are looked at.
        self.sums = WeakTensorKeyDictionary()
        self._before_adding = BeforeAdding(self._empty_if_added)

    def note(self, params: Sequence[Tensor]) -> None:
        """The hook has summed their gradients; those of 0-d are means, which add up as they are."""
        for param in params if self.replica > 0 else ():
            reduced = reduced_of(param)
            if param.grad is None or param.dim() == 0 or (reduced is not None and id(param) in reduced.sums):
                continue  # float32 sums are emptied by themselves
            self.sums[param] = _sample(shard(param.grad, self.world_size, self.rank))
            self._before_adding.watch(param)

    def _empty_if_added(self, param: Tensor) -> None:
        if param in self.sums and adds_to_grad(param):
            self.empty([param])

    @torch.no_grad()
    def empty(self, params: Sequence[Tensor]) -> None:
        """Empty this rank's pieces of what the hook has summed, unless the gradients have been zeroed.

        Before a backward adds to them; and before they are reduced, of those for which it has nothing.
        """
        for param in params if self.sums else ():
            before = self.sums.pop(param, None)
            if before is None or param.grad is None:
                continue
            piece = shard(param.grad, self.world_size, self.rank)
            if torch.equal(_sample(piece), before):
                piece.zero_()
            elif param.grad.any():
                self.fail(
                    f"the gradient of a parameter of shape {tuple(param.shape)} was changed between two backwards, "
                    "which add up over the replicas of device_mesh: change gradients before step() only, or accumulate "
                    "in model.no_sync()"
                )


def _sample(piece: Tensor) -> Tensor:
    """Some values, evenly spaced, as bits, since a nan is not equal to itself."""
    count = min(piece.numel(), 8)
    return piece.take(torch.arange(count) * (piece.numel() // max(count, 1))).view(torch.uint8)
