"""Where the pieces of many tensors lie in one staging area, so that they travel in one message.

The staging area is a matrix [W, n] whose row r holds the pieces of rank r. Each tensor has a column, as wide as its
largest piece. So all full pieces of a tensor are one view of the staging area and one view of the tensor, [k, c, ...]
for k ranks with full pieces, and packing or unpacking takes the same few calls whatever W is. Only a last, shorter
piece is a view of its own. Columns with more full pieces stand further left, so the rows of the last ranks are shorter
and have no gaps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from zeroadam.layout.rows import RowRules, Rows
from zeroadam.layout.shard import shard, shard_dim, shard_range

Views = list[Tensor]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of `tensor` fill one run of memory, in whatever order."""
    return dense_strides(tensor) == tensor.stride()


def flat(tensor: Tensor) -> Tensor:
    """The run of memory of a dense tensor: [c, ...] -> [n]."""
    return tensor.as_strided((tensor.numel(),), (1,))


def adjoins(tensor: Tensor, world_size: int) -> bool:
    """Whether the pieces of `tensor` are runs of memory that follow each other, in the order of the ranks."""
    dim = shard_dim(tensor.shape, world_size)
    if dim is None or not is_dense(tensor):
        return False
    return tensor.shape[dim] == 1 or tensor.stride(dim) * tensor.shape[dim] == tensor.numel()


def direct_rows(tensor: Tensor, world_size: int, rules: RowRules) -> Rows | None:
    """The pieces of `tensor` as rows that travel from and into where they lie; None if they do not."""
    dim = shard_dim(tensor.shape, world_size)
    if world_size == 1 or dim is None or not tensor.numel() or not adjoins(tensor, world_size):
        return None
    size = tensor.shape[dim]
    chunk = shard_range(size, world_size, 0)[1]
    of_one = tensor.numel() // size
    small = chunk * of_one * tensor.itemsize < rules.direct_bytes or (rules.equal and chunk * world_size != size)
    if small and tensor.nbytes < rules.large_bytes:
        return None
    full, short = divmod(size, chunk)
    numels = [chunk * of_one] * full + [short * of_one] * (full < world_size)
    return Rows(flat(tensor), chunk * of_one, numels + [0] * (world_size - len(numels)))


def is_packed(param: Tensor, world_size: int, rules: RowRules) -> bool:
    """Whether a parameter is updated in a staging area: to travel there, or as Adam's kernels want it without gaps.

    Parameters without elements do neither, nor those that every rank updates as a whole: all at W = 1, 0-d ones always.
    """
    if world_size == 1:
        return not is_dense(param)
    return param.dim() > 0 and param.numel() > 0 and direct_rows(param, world_size, rules) is None


def split_by_size(
    tensors: Sequence[Tensor], cap_bytes: float, nbytes: Callable[[Tensor], int] = attrgetter("nbytes")
) -> list[list[Tensor]]:
    """Divide a list of tensors into runs of one dtype and device, of at most `cap_bytes` or of one tensor, in order."""
    runs: list[list[Tensor]] = []
    for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
        left = -1.0
        for tensor in tensors:
            if (tensor.dtype, tensor.device) == kind:
                left -= nbytes(tensor)
                if left < 0:
                    runs.append([])
                    left = cap_bytes - nbytes(tensor)
                runs[-1].append(tensor)
    return runs


def staged_bytes(tensor: Tensor, world_size: int) -> int:
    """What a tensor takes of a staging area whose rows are equally long."""
    return world_size * shard(tensor, world_size, 0).nbytes


@dataclass
class Column:
    """The place of one tensor in a staging area [W, n]."""

    tensor: Tensor  # [d0, ...]
    dim: int | None  # the dimension that is sharded
    full: int  # ranks that own a piece of full size: W for a 0-d tensor
    short: int  # the size along `dim` of the piece of the next rank, if that is shorter
    width: int  # elements of a full piece
    flat: bool  # whether the full pieces are runs of memory that follow each other
    offset: int = 0  # elements from the start of a row
    short_offset: int = 0  # of the shorter piece, in the row of its owner


def column_of(tensor: Tensor, world_size: int) -> Column:
    dim = shard_dim(tensor.shape, world_size)
    if dim is None:
        return Column(tensor, None, world_size, 0, 1, True)
    size = tensor.shape[dim]
    chunk = shard_range(size, world_size, 0)[1]
    full, short = divmod(size, chunk) if chunk else (0, 0)
    return Column(tensor, dim, full, short, shard(tensor, world_size, 0).numel(), adjoins(tensor, world_size))


class Packing:
    """The columns of some tensors of one device, and the copies between the tensors and their columns.

    Args:
        tensors: of any shape [d0, ...].
        dtype: of the staging area; tensors of another dtype are cast on their way.
    """

    def __init__(self, tensors: Sequence[Tensor], world_size: int, rank: int, dtype: torch.dtype) -> None:
        self.tensors, self.world_size, self.rank, self.dtype = list(tensors), world_size, rank, dtype
        self.columns = [column_of(tensor, world_size) for tensor in tensors]
        offset = 0
        order = sorted(self.columns, key=lambda column: (-column.full, not column.flat))
        for column in order:
            column.offset = offset
            offset += column.width
        self.row_numel = offset
        # In each row the full pieces come first, then the shorter ones, so that there are no gaps.
        self.row_numels = [sum(column.width for column in order if rank < column.full) for rank in range(world_size)]
        for column in order:
            if column.short:
                column.short_offset = self.row_numels[column.full]
                self.row_numels[column.full] += shard(column.tensor, world_size, column.full).numel()
        self.nbytes = world_size * self.row_numel * dtype.itemsize
        self.order = order

    def sent_numels(self, rules: RowRules) -> list[int]:
        """The elements that are sent of each rank's row."""
        return [self.row_numel] * self.world_size if rules.equal else self.row_numels

    def use(self, memory: Tensor, rules: RowRules) -> None:
        """Lay the staging area out in `memory`, uint8 [nbytes] or more, and prepare all views."""
        staging = memory[: self.nbytes].view(self.dtype).view(self.world_size, self.row_numel)
        self.rows = Rows(staging.view(-1), self.row_numel, self.sent_numels(rules))
        self.own_pieces = [shard(tensor, self.world_size, self.rank) for tensor in self.tensors]
        self.own_slots = self.slots_of(staging[self.rank])
        self.runs: list[tuple[Views, Tensor, list[int]]] = []  # tensors as [k, width] each, their columns, the widths
        self.single: tuple[Views, Views] = ([], [])  # what no such run holds: of the tensors, of the staging area
        for (full, is_flat), some in groupby(self.order, key=lambda column: (column.full, column.flat)):
            columns = list(some)
            if full and is_flat:
                widths = [column.width for column in columns]
                start = columns[0].offset
                views = [_full_flat(column) for column in columns]
                self.runs.append((views, staging[:full, start : start + sum(widths)], widths))
            for column in columns:
                self._view_single(column, staging)

    def _view_single(self, column: Column, staging: Tensor) -> None:
        """Views for a column whose full pieces are no runs of memory, and for a shorter last piece."""
        tensor, dim = column.tensor, column.dim
        if dim is None or not column.width:
            return
        if column.full and not column.flat:
            piece = shard(tensor, self.world_size, 0)
            shape = (column.full, *piece.shape)
            step = tensor.stride(dim) * piece.shape[dim]
            self.single[0].append(tensor.as_strided(shape, (step, *tensor.stride())))
            strides = (self.row_numel, *dense_strides(piece))
            self.single[1].append(staging.as_strided(shape, strides, staging.storage_offset() + column.offset))
        if column.short:
            self.single[0].append(shard(tensor, self.world_size, column.full))
            row = staging[column.full]
            self.single[1].append(_slot(row, column.short_offset, self.single[0][-1]))

    def slots_of(self, row: Tensor) -> Views:
        """This rank's piece of every tensor inside a row: [n] -> [c, ...] each, in the stride order of the tensor."""
        offsets = [column.offset if self.rank < column.full else column.short_offset for column in self.columns]
        return [_slot(row, offset, piece) for offset, piece in zip(offsets, self.own_pieces, strict=True)]

    def pack_own(self) -> None:
        """Fill this rank's row: [c, ...] each -> [n]."""
        if self.tensors:
            torch._foreach_copy_(self.own_slots, self.own_pieces)

    def pack(self) -> None:
        """Fill all rows: [d0, ...] each -> [W, n]."""
        for views, columns, _ in self.runs:
            if views[0].dtype == self.dtype:
                torch.cat(views, dim=1, out=columns)
            else:
                torch._foreach_copy_(list(columns.split([view.shape[1] for view in views], dim=1)), views)
        if self.single[0]:
            torch._foreach_copy_(self.single[1], self.single[0])

    def unpack(self) -> None:
        """Write all rows into the tensors: [W, n] -> [d0, ...] each."""
        for views, columns, widths in self.runs:
            torch.split_with_sizes_copy(columns, widths, dim=1, out=views)
        if self.single[0]:
            torch._foreach_copy_(self.single[0], self.single[1])

    def keep_own(self, row: Tensor) -> None:
        """Write this rank's row [n] into its pieces of the tensors, and zero into all the others."""
        if not self.tensors:
            return
        torch._foreach_zero_(self.tensors)
        slots = self.own_slots if row.data_ptr() == self.rows[self.rank].data_ptr() else self.slots_of(row)
        torch._foreach_copy_(self.own_pieces, slots)


def dense_strides(like: Tensor) -> tuple[int, ...]:
    """The strides of a tensor without gaps, in the stride order of `like`: those of `torch.empty_like`.

    Where `like` has no memory torch computes them in Python, in 0.2 ms; a row-major tensor has them already.
    """
    return like.stride() if like.is_contiguous() else torch.empty_like(like, device="meta").stride()


def _slot(row: Tensor, offset: int, like: Tensor) -> Tensor:
    return row.as_strided(like.shape, dense_strides(like), row.storage_offset() + min(offset, row.numel()))


def _full_flat(column: Column) -> Tensor:
    """All full pieces of a tensor as [k, width]; a 0-d tensor is every rank's."""
    strides = (0 if column.dim is None else column.width, 1)
    return column.tensor.as_strided((column.full, column.width), strides)
