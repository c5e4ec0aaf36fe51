"""float16 gradients where the backend itself adds: divided by W before the sum, as DDP does, not after it.

Sums of W numbers overflow where their mean does not, and float16 ends at 65504. So this rank's piece holds the mean m,
not the sum. Another backward adds its gradient g to that, and dividing m + g by W would divide m a second time: m is
multiplied by W before. Only where that overflows do several backwards without `no_sync()` give an infinity that DDP's
would not.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zeroadam.layout.shard import shard
from zeroadam.reduce.before_adding import BeforeAdding


class Means:
    """Knows which gradients are means in this rank's piece, to which nothing has been added yet."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        # parameter -> whether its gradient is such a mean; those of 0-d ones are on all ranks, and add up as they are.
        self._held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._before_adding = BeforeAdding(self._multiply_if_held)

    def note(self, params: Iterable[Tensor]) -> None:
        """A backward has left means, [c, ...] each, in the gradients of these parameters."""
        for param in params:
            if param.dim() > 0:
                self._before_adding.watch(param)
                self._held[param] = True

    def divide(self, params: Iterable[Tensor], grads: list[Tensor]) -> None:
        """Before gradients are summed: [d0, ...] each, in place."""
        for param, grad in zip(params, grads, strict=True):
            if self._held.get(param):  # nothing was added to it in this backward
                self._multiply(param, grad)
        torch._foreach_div_(grads, self.process_group.size())

    def _multiply_if_held(self, param: Tensor) -> None:
        if self._held.get(param):
            self._multiply(param, param.grad)

    @torch.no_grad()
    def _multiply(self, param: Tensor, grad: Tensor | None) -> None:
        self._held[param] = False
        if grad is not None:
            shard(grad, self.process_group.size(), self.process_group.rank()).mul_(self.process_group.size())
