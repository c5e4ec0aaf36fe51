"""Gradients of fewer bits, summed in float32 over the ranks and over backwards, by the rank that owns them.

`p.grad` cannot hold such a sum: it shows the sum rounded, in the piece of its owner. So that the next backward adds to
nothing there, the piece is emptied just before, and what is reduced are the new gradients alone, which the sum then
gets. Whether it goes on is for `p.grad` to say: where that is None, or zero, the next backward begins another one.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam._compat import adds_to_grad, current_graph_task_id
from zeroadam.layout.packing import dense_strides
from zeroadam.layout.shard import shard_index
from zeroadam.reduce.before_adding import BeforeAdding
from zeroadam.reduce.ownership import Reduced, reduced_of


class FloatSum:
    """Of the gradients of one parameter.

    Args:
        grad: [d0, ...], one of them.
        cut: the index of this rank's piece.
        ranks: over which they are summed.
    """

    def __init__(self, grad: Tensor, cut: tuple[slice, ...], ranks: int) -> None:
        self.cut, piece = cut, grad[cut]
        self.total = torch.zeros(piece.numel(), dtype=torch.float32, device=grad.device)
        self.total = self.total.as_strided(piece.shape, dense_strides(piece))  # [c, ...]
        self.divisor = ranks if grad.dim() == 0 else 1  # p.grad of a 0-d parameter shows the mean
        self.begun = False  # whether the next backward adds to it
        self.shown = False  # whether p.grad shows it; if not, a backward has begun to add to p.grad
        self.backward = -1  # the number of that
        self.refused = ""  # why no other backward can be added

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """As p.grad shows it: [c, ...]."""
        return self.total.to(dtype).div_(self.divisor)

    def show(self, grad: Tensor) -> None:
        """Write it into this rank's piece of p.grad, [d0, ...]."""
        grad[self.cut].copy_(self.rounded(grad.dtype))

    def restart(self) -> None:
        self.begun, self.refused = False, ""

    def zero(self) -> None:
        """As p.grad was, in place."""
        self.total.zero_()
        self.restart()

    def take(self, grad: Tensor | None, note: Reduced) -> None:
        """Empty this rank's piece of p.grad, [d0, ...], before a backward adds to that, if the sum goes on."""
        backward = current_graph_task_id()
        if grad is None:
            self.restart()
        elif self.begun and not self.shown and backward != self.backward:
            self.refused = (
                "grad_dtype=torch.float32 takes no backward in no_sync() after one outside of it: leave out no_sync() "
                "in all backwards of a step, or in the last one only, and give torch.utils.checkpoint "
                "use_reentrant=False; where a backward has failed, build DistributedDataParallel and the optimizer anew"
            )
        elif self.begun and self.shown:
            piece = grad[self.cut]
            # Of a gradient that is mostly zero, the values that are compared can miss that it has been zeroed.
            zeroed = grad.is_cpu and not piece.any() and bool(self.rounded(grad.dtype).any())
            if not zeroed and (
                note.is_whole(grad, backward) or (self.total.any() and _same_bits(piece, self.rounded(grad.dtype)))
            ):
                piece.zero_()
                self.shown, self.backward = False, backward
            elif not piece.any():  # it was zeroed
                self.restart()
            else:
                self.refused = (
                    f"the gradient of a parameter of shape {tuple(grad.shape)} was changed between two backwards, of "
                    "which grad_dtype=torch.float32 takes the sum: zero it by optimizer.zero_grad(), clip it by "
                    "optimizer.clip_grad_norm_()"
                )


def find_sums(
    grads: Mapping[Tensor, Tensor], process_group: dist.ProcessGroup, ranks: int, wanted: bool
) -> dict[int, FloatSum]:
    """The sums of parameters' gradients, [d0, ...] each, by the ids of the parameters: those that are there, or new.

    Args:
        grads: of one dtype, in one DDP bucket.
        ranks: over which they are summed.
        wanted: whether to make some; if not, only what has begun goes on.
    """
    sums: dict[int, FloatSum] = {}
    wanted = wanted or any(one is not None and one.begun for one in map(sum_of, grads))
    for param, grad in grads.items() if wanted else ():
        if grad.itemsize >= 4:
            break
        cut, before = shard_index(grad.shape, process_group.size(), process_group.rank()), sum_of(param)
        if before is None or before.cut != cut:
            sums[id(param)] = FloatSum(grad, cut, ranks)
        elif before.total.stride() == dense_strides(grad[cut]) and before.total.device == grad.device:
            sums[id(param)] = before
        else:  # as the parameter has another memory format now
            new = sums[id(param)] = FloatSum(grad, cut, ranks)
            vars(new).update(vars(before), total=new.total.copy_(before.total))
        _before_adding.watch(param)
    return sums


def sum_of(param: Tensor) -> FloatSum | None:
    """That of the gradient that the hook last wrote, if it was summed in float32."""
    note = reduced_of(param)
    found: FloatSum | None = None if note is None else note.sums.get(id(param))
    return found


@torch.no_grad()
def take(param: Tensor) -> FloatSum | None:
    """See `FloatSum.take`."""
    if (found := sum_of(param)) is not None and (note := reduced_of(param)) is not None:
        found.take(param.grad, note)
    return found


def _take_if_added(param: Tensor) -> None:
    one = sum_of(param)
    if one is not None and one.begun and adds_to_grad(param):
        take(param)


_before_adding = BeforeAdding(_take_if_added)


def add_up(sums: Sequence[FloatSum], totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add what a backward brings, or begin with it.

    totals: the memory of each sum, in the shape of its part: [c, ...], or [n].
    """
    # Some have begun in their own memory.
    apart = [i for i in range(len(sums)) if totals[i].data_ptr() != parts[i].data_ptr()]
    for goes_on, call in ((False, torch._foreach_copy_), (True, torch._foreach_add_)):
        chosen = [i for i in apart if sums[i].begun == goes_on]
        if chosen:
            call([totals[i] for i in chosen], [parts[i] for i in chosen])
    for one in sums:
        one.begun = one.shown = True


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))
