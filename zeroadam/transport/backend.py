"""The transport of NCCL and of every other backend that is not gloo: the backend's own collectives."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, ReduceScatterOptions

from zeroadam._compat import grouped
from zeroadam.layout.rows import RowRules, Rows

# Pieces of this size and more are not packed: a message of their own costs less than copying them twice.
DIRECT_BYTES = 256 * 2**10


class Backend:
    """See `zeroadam.transport.Transport`. The order of a sum is the backend's."""

    rules = RowRules(equal=True, direct_bytes=DIRECT_BYTES)
    waits_in_forward = True
    clears_others = False
    same_on_all_ranks = False
    sums_on_device = True
    senders = 0  # the sum is taken in place

    def __init__(self, process_group: dist.ProcessGroup, channel: Any = None) -> None:
        self.process_group, self.channel = process_group, channel

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        rank, group = self.process_group.rank(), self.process_group
        even = [rows for rows in exchanges if rows.equal]
        outputs, inputs = [rows.whole() for rows in even], [rows[rank] for rows in even]
        others = {id(rows): list(rows) for rows in exchanges if not rows.equal}

        def start() -> list[Callable[[], None]]:
            together = [all_gather_together(outputs, inputs, group)] if even else []
            works = [broadcast_rows(others[id(rows)], group) if id(rows) in others else together for rows in exchanges]
            return [partial(wait_for, of_one) for of_one in works]

        return start

    def prepare_reduce(
        self,
        exchanges: Sequence[Rows],
        scratch: Sequence[Sequence[Tensor]],  # noqa: ARG002
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        rank, group = self.process_group.rank(), self.process_group
        even = [rows for rows in exchanges if rows.equal]
        outputs, inputs = [rows[rank] for rows in even], [rows.whole() for rows in even]
        others = [list(rows) for rows in exchanges if not rows.equal]
        sums = [rows[rank] for rows in exchanges]

        def start() -> Callable[[], list[Tensor]]:
            works = [reduce_scatter_together(outputs, inputs, group)] if even else []
            for rows in others:
                works += reduce_rows(rows, group)

            def finish() -> list[Tensor]:
                wait_for(works)
                return sums

            return finish

        return start


class OrderedBackend(Backend):
    """A backend whose sums are taken here, in rank order and in float32, after an all-to-all."""

    same_on_all_ranks = True

    def __init__(self, process_group: dist.ProcessGroup, channel: Any = None) -> None:
        super().__init__(process_group, channel)
        self.senders = process_group.size()

    def prepare_reduce(
        self, exchanges: Sequence[Rows], scratch: Sequence[Sequence[Tensor]]
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        return prepare_ordered_reduce(self.process_group, exchanges, scratch)


def prepare_ordered_reduce(
    process_group: dist.ProcessGroup, exchanges: Sequence[Rows], scratch: Sequence[Sequence[Tensor]]
) -> Callable[[], Callable[[], list[Tensor]]]:
    """`Transport.prepare_reduce` by an all-to-all. scratch: W rows for each exchange, one behind the other."""
    rank = process_group.rank()
    own_rows = [rows[rank] for rows in exchanges]
    gathered = [
        received[0].as_strided((len(received) * own.numel(),), (1,))
        for own, received in zip(own_rows, scratch, strict=True)
    ]

    def start() -> Callable[[], list[Tensor]]:
        works = [
            all_to_all(output, rows.sent(), [rows.numels[rank]] * len(rows), list(rows.numels), process_group)
            for output, rows in zip(gathered, exchanges, strict=True)
        ]

        def finish() -> list[Tensor]:
            wait_for(works)
            return [
                sum_rows(own, [*received[:rank], *received[rank + 1 :]], rank)
                for own, received in zip(own_rows, scratch, strict=True)
            ]

        return finish

    return start


def sum_rows(own: Tensor, received: Sequence[Tensor], rank: int) -> Tensor:
    """The sum over all ranks, in rank order and at least float32: [n] of every rank -> [n].

    Overwrites `own`, or else `received`, and returns the one with the sum, or a float32 tensor for a lower precision.
    """
    rows = [*received[:rank], own, *received[rank:]]
    if not received:
        return own
    if own.itemsize < 4:
        total = rows[0].float()
        for row in rows[1:]:
            total += row
        return total
    total = rows[0]
    for source, row in enumerate(rows[1:], start=1):
        total = torch.add(total, row, out=own if source >= rank else total)
    return total


def all_gather_together(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], process_group: dist.ProcessGroup
) -> dist.Work:
    """One all-gather for several tensors: input [n] of each rank -> output [W * n]. NCCL makes one launch of it."""
    options = AllgatherOptions()
    options.asyncOp = True
    return process_group.allgather_into_tensor_coalesced(list(outputs), list(inputs), options)


def reduce_scatter_together(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], process_group: dist.ProcessGroup
) -> dist.Work:
    """One reduce-scatter for several tensors: input [W * n] -> output [n], the sum over the ranks."""
    options = ReduceScatterOptions()
    options.asyncOp = True
    return process_group.reduce_scatter_tensor_coalesced(list(outputs), list(inputs), options)


def all_to_all(
    output: Tensor, given: Tensor, received: list[int], sent: list[int], process_group: dist.ProcessGroup
) -> dist.Work | None:
    """The rows of all ranks for this one; `received` and `sent` are their numbers of elements."""
    work: dist.Work | None = dist.all_to_all_single(output, given, received, sent, group=process_group, async_op=True)
    return work


def broadcast_rows(rows: Sequence[Tensor], process_group: dist.ProcessGroup) -> list[dist.Work]:
    """An all-gather of rows that are not equally long: each rank's own, [n_r], goes to all others."""
    calls = [partial(dist.broadcast, row, group_src=source) for source, row in enumerate(rows) if row.numel() > 0]
    return grouped(calls, process_group, rows[0].device)


def reduce_rows(rows: Sequence[Tensor], process_group: dist.ProcessGroup) -> list[dist.Work]:
    """A reduce-scatter of rows that are not equally long: row r of rank r, [n_r], is the sum; the others anything."""
    calls = [partial(dist.reduce, row, group_dst=target) for target, row in enumerate(rows) if row.numel() > 0]
    return grouped(calls, process_group, rows[0].device)


def backends(process_group: dist.ProcessGroup) -> dict[str, str]:
    """The names of the backends of a process group by device type."""
    return dict(entry.split(":") for entry in dist.get_backend_config(process_group).split(","))


def backend_of(process_group: dist.ProcessGroup, device_type: str) -> str:
    """The backend for tensors on `device_type`; raises ValueError if there is none."""
    found = backends(process_group)
    if device_type not in found:
        raise ValueError(f"the process group has no backend for {device_type} tensors, only for {sorted(found)}")
    return found[device_type]


def wait_for(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()


# torch 2.13 has a new name for this and warns of the old one, which is all that 2.11 has.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
