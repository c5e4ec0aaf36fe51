"""Tensors whose pieces travel together, parameters or gradients: no communication, only what lies where.

Most of a model's bytes lie in large pieces that are one run of memory. These travel directly from and into the
tensor. The others are packed: the piece of rank r of every such tensor, one behind the other, is row r of a staging
area [W, n]. Adam runs on a parameter itself or, if it is packed, on this rank's row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zeroadam.shard import shard

# Pieces of this size and more are not packed: a message of their own costs less than copying them twice.
DIRECT_BYTES = 256 * 2**10
# Buckets whose gather may be under way at once if they pack something; each of them has staging memory of its own.
IN_FLIGHT = 3


class Bucket:
    """Some parameters of one param group, dtype and device.

    Args:
        params: parameters of any shape [d0, ...].
        group_index: their place in `optimizer.param_groups`.
        rank, world_size: in the process group over which they are cut.
        equal_rows: whether the rows of one exchange must have one length and follow each other in memory.
        wire_dtype: in which dtype they travel, if not in their own; all are packed then.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        group_index: int,
        rank: int,
        world_size: int,
        *,
        equal_rows: bool,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.group_index, self.rank, self.world_size = group_index, rank, world_size
        self.dtype = wire_dtype or params[0].dtype
        self.equal_rows = equal_rows
        alone = {p for p in params if p.dtype == self.dtype and is_direct(p, world_size, equal_rows)}
        self.direct = [p for p in params if p in alone]
        self.packed = [p for p in params if p not in alone]
        self.params = [*self.direct, *self.packed]
        self.layouts = [_layout(p) for p in self.params]
        self._view_pieces()
        self.row_numels = [sum(piece.numel() for piece in pieces) for pieces in self.packed_pieces]
        self.staging_bytes = world_size * max(self.row_numels) * self.dtype.itemsize
        direct = [sum(rows[rank].numel() for rows in self.direct_rows) for rank in range(world_size)]
        self.numels = [sum(both) for both in zip(direct, self.row_numels, strict=True)]  # of each rank
        sent = [max(self.row_numels)] * world_size if equal_rows else self.row_numels
        self.row_bytes = [self.dtype.itemsize * sum(both) for both in zip(direct, sent, strict=True)]

    def _view_pieces(self) -> None:
        """Views of what belongs to whom, as long as the parameters stay where they are: [W][params] of [c, ...]."""
        ranks = range(self.world_size)
        self.addresses = [p.data_ptr() for p in self.params]
        self.packed_pieces = [[self._piece(p, r) for p in self.packed] for r in ranks]
        self.direct_pieces = [self._piece(p, self.rank) for p in self.direct]
        self._rows: Rows | None = None
        self.direct_rows = [[flat(self._piece(p, r)) for r in ranks] for p in self.direct]

    def bytes_of_gather(self) -> tuple[int, int]:
        """(sent, received) by this rank when it sends its rows to all others."""
        own, all_rows = self.row_bytes[self.rank], sum(self.row_bytes)
        return (self.world_size - 1) * own, all_rows - own

    def bytes_of_reduce(self) -> tuple[int, int]:
        """(sent, received) by this rank when it sends each of the others its row."""
        return self.bytes_of_gather()[::-1]

    def use_staging(self, memory: Tensor) -> None:
        """Lay the rows out in `memory`, uint8 [staging_bytes] or more, which is needed from `pack` to `unpack`."""
        staging = memory[: self.staging_bytes].view(self.dtype).view(self.world_size, -1)
        self._rows = None
        self.row_pieces = [self._cut(row, rank) for rank, row in enumerate(staging)]
        if self.equal_rows:
            self.staging_rows = list(staging)
        else:
            self.staging_rows = [row[:numel] for row, numel in zip(staging, self.row_numels, strict=True)]

    def _cut(self, row: Tensor, rank: int) -> list[Tensor]:
        """The packed pieces of `rank` inside its row: [n] -> [c, ...] each, in the stride order of the parameter."""
        cut, offset = [], 0
        for piece in self.packed_pieces[rank]:
            cut.append(row[offset:].as_strided(piece.shape, torch.empty_like(piece, device="meta").stride()))
            offset += piece.numel()
        return cut

    def check(self) -> None:
        """Raise RuntimeError for a gradient that is sparse, or a parameter that is no longer what it was."""
        for param, layout in zip(self.params, self.layouts, strict=True):
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} has a sparse gradient, which Adam does not support: "
                    "build its module with sparse=False"
                )
            if _layout(param) != layout:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} was {layout} (dtype, device, stride) when the "
                    f"optimizer was built and is {_layout(param)} now: build it after casting and moving the model"
                )
        if [p.data_ptr() for p in self.params] != self.addresses:  # p.data = ...
            self._view_pieces()

    def pack(self) -> list[Tensor]:
        """This rank's piece of every parameter, dense, to be updated in place: [d0, ...] -> [c, ...]."""
        copies = self.row_pieces[self.rank]
        if copies:
            torch._foreach_copy_(copies, self.packed_pieces[self.rank])
        return [*self.direct_pieces, *copies]

    def pack_all(self) -> None:
        """Fill all rows: [d0, ...] each -> [W, n]."""
        for copies, pieces in zip(self.row_pieces, self.packed_pieces, strict=True):
            if copies:
                torch._foreach_copy_(copies, pieces)

    def rows(self) -> "Rows":
        """What to exchange: lists of W dense rows, [n_r] of rank r, one for each direct tensor and one for the rest.

        The same list every time, as long as everything stays where it is.
        """
        if self._rows is None:
            self._rows = Rows([*self.direct_rows, self.staging_rows] if self.packed else self.direct_rows)
        return self._rows

    def unpack(self) -> None:
        """Write the gathered rows into the packed parameters: [W, n] -> [d0, ...] each."""
        for copies, pieces in zip(self.row_pieces, self.packed_pieces, strict=True):
            if copies:
                torch._foreach_copy_(pieces, copies)

    def keep_own(self, sums: Sequence[Tensor], *, others_are_zero: bool) -> None:
        """Write this rank's rows, one for each of `rows()`, in place of what the tensors hold, and zero elsewhere.

        others_are_zero: whether the rows of other ranks are already.
        """
        for rows, total in zip(self.direct_rows, sums, strict=False):
            if total is not rows[self.rank]:
                rows[self.rank].copy_(total)
        elsewhere = [row for rows in self.direct_rows for rank, row in enumerate(rows) if rank != self.rank]
        if elsewhere and not others_are_zero:
            torch._foreach_zero_(elsewhere)
        if self.packed:
            torch._foreach_zero_([tensor.detach() for tensor in self.packed])
            summed = sums[-1] is self.staging_rows[self.rank]
            copies = self.row_pieces[self.rank] if summed else self._cut(sums[-1], self.rank)
            torch._foreach_copy_(self.packed_pieces[self.rank], copies)

    def _piece(self, param: Tensor, rank: int) -> Tensor:
        return shard(param.detach(), self.world_size, rank)


class Rows(list[list[Tensor]]):
    """Lists of W rows, with room for how a road cuts them into messages."""

    messages: Any = None


def is_direct(tensor: Tensor, world_size: int, equal_rows: bool) -> bool:
    """Whether the pieces of `tensor` travel from and into where they lie, because they are large runs of memory."""
    pieces = [shard(tensor, world_size, rank) for rank in range(world_size)]
    if pieces[0].nbytes < DIRECT_BYTES or not all(is_dense(piece) for piece in pieces):
        return False
    return not equal_rows or (is_dense(tensor) and len({piece.numel() for piece in pieces}) == 1)


def split_by_size(params: Sequence[Tensor], cap_bytes: float) -> list[list[Tensor]]:
    """Cut a list of parameters into runs of one dtype and device of about `cap_bytes`, in order."""
    runs: list[list[Tensor]] = []
    for kind in dict.fromkeys((p.dtype, p.device) for p in params):
        room = 0.0
        for param in params:
            if (param.dtype, param.device) == kind:
                if room <= 0:
                    runs.append([])
                    room = cap_bytes
                runs[-1].append(param)
                room -= param.nbytes
    return runs


def make_buckets(
    params: Sequence[Tensor],
    group_index: int,
    rank: int,
    world_size: int,
    cap_bytes: float,
    equal_rows: Callable[[Tensor], bool],
) -> list[Bucket]:
    """Buckets of about `cap_bytes` for parameters of one param group; those that pack nothing apart, as they need not
    wait for staging memory."""
    buckets = []
    direct = {p: is_direct(p, world_size, equal_rows(p)) for p in params}
    for kind in (False, True):
        for some in split_by_size([p for p in params if direct[p] is kind], cap_bytes):
            buckets.append(Bucket(some, group_index, rank, world_size, equal_rows=equal_rows(some[0])))
    return buckets


def staging_bytes(buckets: Sequence[Bucket]) -> int:
    """Of the memory that `share_staging` makes for buckets on one device."""
    packed = [bucket.staging_bytes for bucket in buckets if bucket.packed]
    return min(IN_FLIGHT, len(packed)) * max(packed, default=0)


def share_staging(buckets: Sequence[Bucket]) -> None:
    """Give all buckets their rows, so that of those with packed tensors `IN_FLIGHT` in a row can be in use."""
    most = max(bucket.staging_bytes for bucket in buckets)
    memory: dict[tuple[torch.device, int], Tensor] = {}
    packed = [bucket for bucket in buckets if bucket.packed]
    for k, bucket in enumerate(packed):
        slot = (bucket.params[0].device, k % IN_FLIGHT)
        if slot not in memory:
            memory[slot] = torch.empty(most, dtype=torch.uint8, device=slot[0])
        bucket.use_staging(memory[slot])
    for bucket in buckets:
        if not bucket.packed:
            bucket.use_staging(torch.empty(0, dtype=torch.uint8, device=bucket.params[0].device))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of `tensor` fill one run of memory, in whatever order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def flat(tensor: Tensor) -> Tensor:
    """The run of memory of a dense tensor: [c, ...] -> [n]."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _layout(param: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
    return param.dtype, param.device, param.stride()
