"""Gradients of a DDP bucket that are reduced together: [d0, ...] -> [d0, ...] with the sum in this rank's piece.

Large pieces are sent from where they lie, the others are packed, as in `zeroadam.gather.param_bucket`.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.layout.packing import Packing, direct_rows, flat
from zeroadam.layout.rows import Rows
from zeroadam.reduce.float_sums import FloatSum, add_up, take
from zeroadam.reduce.means import Means
from zeroadam.reduce.ownership import Reduced, note
from zeroadam.transport import Transport
from zeroadam.transport.shared_memory import SharedMemory


class GradBucket:
    """Some gradients of one dtype and device.

    Args:
        grads: [d0, ...] each, in the memory of one DDP bucket.
        wire_dtype: the dtype in which they are sent, None for their own.
        reduced: the note about the DDP bucket, shared by all parts of it.
        means: what divides the gradients before the sum, if `reduced.means`.
        ranks: over which they are summed, if not those of the process group.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        process_group: dist.ProcessGroup,
        transport: Transport,
        wire_dtype: torch.dtype | None,
        reduced: Reduced,
        means: Means,
        ranks: int = 0,
    ) -> None:
        self.means = means if reduced.means else None
        self.params, self.grads, self.reduced = list(params), list(grads), reduced
        self.process_group, self.transport = process_group, transport
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self.ranks = ranks = ranks or self.world_size
        dtype = wire_dtype or grads[0].dtype
        rows_of = [direct_rows(g, self.world_size, transport.rules) if g.dtype == dtype else None for g in grads]
        self.direct: list[Rows] = [rows for rows in rows_of if rows is not None]
        travels = ranks > 1 or dtype != grads[0].dtype
        packed = [g for g, rows in zip(grads, rows_of, strict=True) if travels and rows is None and g.numel()]
        self.packing = Packing(packed, self.world_size, self.rank, dtype)
        # In the order of what a reduction gives: of those that travel directly, are packed, and do not travel.
        order = sorted(range(len(grads)), key=lambda i: (rows_of[i] is None, not (travels and grads[i].numel())))
        self.float_sums: list[FloatSum] = [reduced.sums[id(params[i])] for i in order if reduced.sums]
        self.zero_dim = [grad for grad in grads if grad.dim() == 0]
        own = [rows.numels[self.rank] for rows in self.direct]
        row_numels = self.packing.sent_numels(transport.rules)
        if self.packing.tensors:
            own.append(row_numels[self.rank])
        self.received_numels = [transport.senders * numel for numel in own]
        self.received_from = -(-self.packing.nbytes // 8) * 8  # bytes; aligned for every dtype
        self.memory_bytes = self.received_from + sum(self.received_numels) * dtype.itemsize
        self.memory: Tensor | None = None
        # Whether it must be finished before its staging memory is used again, or to make the sums.
        self.staged = self.memory_bytes > 0 or not transport.sums_on_device
        sizes = [
            dtype.itemsize * (row_numels[r] + sum(rows.numels[r] for rows in self.direct))
            for r in range(self.world_size)
        ]
        # (sent, received) by this rank: it sends each of the others its row; then replicas reduce and gather its own.
        replicas, own_bytes = ranks // self.world_size, sizes[self.rank]
        total_bytes = own_bytes * max(1, 4 // dtype.itemsize) if replicas > 2 else own_bytes
        across = (own_bytes + total_bytes) * (replicas - 1) // replicas
        self.bytes_moved = (
            sum(sizes) - sizes[self.rank] + across,
            (self.world_size - 1) * sizes[self.rank] + across,
        )
        self.totals: list[Tensor] = []  # the float32 sums,
        self.shown: list[Tensor] = []  # and what the gradients show of them
        for i, one in zip(order, self.float_sums, strict=False):
            rows = rows_of[i]
            self.totals.append(one.total if rows is None else flat(one.total))
            self.shown.append(grads[i][one.cut] if rows is None else rows[self.rank])
        self.noted = -1  # `reduced.lost` when it was noted for all parameters

    def start(self, memory: Tensor) -> None:
        """Pack, send and receive; `memory` is uint8, [memory_bytes] or more, and in use until `finish`."""
        if memory is not self.memory:
            self._use(memory)
        for param in self.params if self.float_sums else ():
            one = self.reduced.sums[id(param)]
            if one.shown:  # this backward has nothing for it
                take(param)
            if one.refused:
                raise RuntimeError(one.refused)
        if self.means is not None:
            self.means.divide(self.params, self.grads)
        self.packing.pack()
        self.sums = self._start()

    def _use(self, memory: Tensor) -> None:
        self.memory = memory
        self.packing.use(memory, self.transport.rules)
        self.exchanges = [*self.direct, *([self.packing.rows] if self.packing.tensors else [])]
        received = memory[self.received_from : self.memory_bytes].view(self.packing.dtype)
        scratch: list[list[Tensor]] = []  # for each exchange, a row for each rank that sends
        for part in received.split(self.received_numels):
            scratch.append(list(part.view(self.transport.senders, -1)) if self.transport.senders else [])
        prepare = self.transport.prepare_reduce
        if self.float_sums and isinstance(self.transport, SharedMemory):
            prepare = partial(self.transport.prepare_reduce, into=self._unused_totals)
        self._start = prepare(self.exchanges, scratch) if self.exchanges else lambda: list
        self.own = [rows[self.rank] for rows in self.direct]
        self.others = [run for rows in self.direct for run in rows.others(self.rank) if run.numel()]

    def _unused_totals(self) -> list[Tensor | None]:
        """For each exchange, the memory of a float32 sum that begins with it."""
        found = [None if one.begun else total for one, total in zip(self.float_sums, self.totals, strict=True)]
        return [*found[: len(self.direct)], *([None] if self.packing.tensors else [])]

    def finish(self) -> None:
        """Wait, and leave the sums in this rank's pieces of the gradients, zero elsewhere, means in 0-d ones."""
        sums = self.sums()
        if self.float_sums:
            parts = [*sums[: len(self.direct)], *(self.packing.slots_of(sums[-1]) if self.packing.tensors else ())]
            add_up(self.float_sums, self.totals, [*parts, *self.shown[len(parts) :]])
        for own, total in zip(self.own, self.totals or sums, strict=False):
            if total.data_ptr() != own.data_ptr():
                own.copy_(total)
        if self.others and not self.transport.clears_others:
            torch._foreach_zero_(self.others)
        if self.packing.tensors:
            self.packing.keep_own(sums[-1])
        if self.float_sums:
            count = len(self.direct)
            torch._foreach_copy_(self.shown[count:], self.totals[count:])
        if self.zero_dim and self.ranks > 1:
            if self.means is None:
                torch._foreach_div_(self.zero_dim, self.ranks)
            if not self.transport.same_on_all_ranks:
                together = torch.stack(self.zero_dim)
                dist.broadcast(together, group=self.process_group, group_src=0)
                torch._foreach_copy_(self.zero_dim, list(together))

    def remember(self) -> None:
        """Note which version the gradients are, once nothing more is written to their bucket."""
        if self.reduced.version != self.grads[0]._version:  # or another part of the bucket has seen to it
            self.reduced.remember(self.grads[0])
        if self.noted != self.reduced.lost:  # not every time, as it takes longer than all the rest
            self.noted = self.reduced.lost
            note(self.params, self.reduced)
        if self.means is not None:
            self.means.note(self.params)
