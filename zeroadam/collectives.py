"""The two collectives of ZeRO over rows, one for each of W ranks: reduce-scatter and all-gather; and a gather to one.

gloo's own reduce-scatter is an all-reduce inside and its all-gather takes three times as long as the same bytes
sent directly. So on gloo every rank sends each of the others its row, and sums of rows are taken here, in rank
order: they do not depend on timing or on what else is sent. Other backends use their own collectives.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

# Larger messages between two hosts tend to go one direction at a time.
MESSAGE_BYTES = 4 * 2**20
# Keeps our messages apart from a pipeline's own sends and receives in the same process group.
TAG = 0x2E60


def is_gloo(process_group: dist.ProcessGroup, device_type: str) -> bool:
    """Whether tensors on `device_type` travel by gloo in `process_group` (a group may have a backend per device)."""
    backends = _backends(process_group)
    if device_type not in backends:
        raise ValueError(f"the process group has no backend for {device_type} tensors, only for {sorted(backends)}")
    return backends[device_type] == "gloo"


def all_gather(exchanges: Sequence[Sequence[Tensor]], process_group: dist.ProcessGroup) -> Callable[[], None]:
    """Start to send row `rank` to every rank and to receive the others; returns what waits for it.

    exchanges: any number of lists of W dense 1-D rows, [n_r] of rank r on every rank. Backends other than gloo need
    the rows of one list to have one length and to follow each other in memory.
    """
    rank, device_type = process_group.rank(), exchanges[0][0].device.type
    works: list[dist.Work | None] = []
    if not is_gloo(process_group, device_type):
        for rows in exchanges:
            works.append(_all_gather_single(_joined(rows), rows[rank], group=process_group, async_op=True))
    elif device_type == "cpu":
        for rows in exchanges:
            works += _exchange([rows[rank]] * len(rows), rows, process_group)
    else:  # gloo sends and receives CPU tensors only; its broadcast takes any
        for rows in exchanges:
            for source, row in enumerate(rows):
                if row.numel() > 0:
                    works.append(dist.broadcast(row, group=process_group, group_src=source, async_op=True))
    return partial(_wait, works)


def reduce_scatter(
    exchanges: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]], process_group: dist.ProcessGroup
) -> Callable[[], list[Tensor]]:
    """Start to send row r to rank r and to receive this rank's row from all; returns what waits and gives the sums.

    exchanges: lists of W dense 1-D rows, [n_r] for rank r; unchanged until the sums are there: [n_rank] of each list.
    received: for each of them, on gloo W - 1 rows [n_rank] to receive into; else none, and the sum is in row `rank`.
    """
    rank, device_type = process_group.rank(), exchanges[0][0].device.type
    gloo = is_gloo(process_group, device_type)
    works: list[dist.Work | None] = []
    for rows, others in zip(exchanges, received, strict=True):
        incoming = [*others[:rank], rows[rank], *others[rank:]]
        if not gloo:
            works.append(_reduce_scatter_single(rows[rank], _joined(rows), group=process_group, async_op=True))
        elif device_type == "cpu":
            works += _exchange(rows, incoming, process_group)
        else:
            sizes = [row.numel() for row in rows]
            gathered = rows[0].new_empty(len(rows) * sizes[rank])
            sent = torch.cat(list(rows))
            dist.all_to_all_single(gathered, sent, [sizes[rank]] * len(rows), sizes, group=process_group)
            for row, part in zip(incoming, gathered.view(len(rows), -1), strict=True):
                row.copy_(part)

    def finish() -> list[Tensor]:
        _wait(works)
        return [sum_rows(rows[rank], others, rank) for rows, others in zip(exchanges, received, strict=True)]

    return finish


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


def gather(piece: Tensor, pieces: Sequence[Tensor], to: int, process_group: dist.ProcessGroup) -> None:
    """Copy the piece [c, ...] of each rank r to `pieces[r]` on rank `to`, of any strides and on the CPU. Waits for it.

    No rank needs more memory for it than one piece.
    """
    rank = process_group.rank()
    device = torch.device("cpu") if "cpu" in _backends(process_group) else piece.device
    if rank != to:
        works = [
            process_group.send([message], to, TAG) for message in _messages(piece.to(device).contiguous().view(-1))
        ]
        for work in works:
            work.wait()
        return
    for source, target in enumerate(pieces):
        if source == rank:
            target.copy_(piece)
            continue
        direct = target.is_contiguous() and device.type == "cpu"
        received = target if direct else torch.empty(target.shape, dtype=target.dtype, device=device)
        for message in _messages(received.view(-1)):
            process_group.recv([message], source, TAG).wait()
        if not direct:
            target.copy_(received)


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()


def _backends(process_group: dist.ProcessGroup) -> dict[str, str]:
    return dict(entry.split(":") for entry in dist.get_backend_config(process_group).split(","))


def _exchange(
    outgoing: Sequence[Tensor], incoming: Sequence[Tensor], process_group: dist.ProcessGroup
) -> list[dist.Work]:
    """Send `outgoing[r]` to every other rank r and receive `incoming[r]` from it, in messages of a few MB."""
    rank, world_size, works = process_group.rank(), process_group.size(), []
    for distance in range(1, world_size):  # every rank starts with another peer
        target, source = (rank + distance) % world_size, (rank - distance) % world_size
        works += [process_group.recv([message], source, TAG) for message in _messages(incoming[source])]
        works += [process_group.send([message], target, TAG) for message in _messages(outgoing[target])]
    return works


def _messages(row: Tensor) -> Sequence[Tensor]:
    return row.split(MESSAGE_BYTES // row.element_size()) if row.numel() > 0 else ()


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """The memory of equal rows that follow each other: W times [n] -> [W * n]."""
    return rows[0].as_strided((len(rows) * rows[0].numel(),), (1,))


# torch 2.13 has new names for these and warns of the old ones, which are all that 2.11 has.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
