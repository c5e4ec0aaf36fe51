"""The all-gather of ZeRO: W rows, row r filled by rank r, become the same W rows on every rank.

gloo's own all-gather takes three times as long as the same bytes sent directly, so on gloo every rank sends
its row to each of the others. Everything here returns at once; the rows are whole when the works have been
waited for.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

# Larger messages between two hosts tend to go one direction at a time.
MESSAGE_BYTES = 4 * 2**20
# Keeps our messages apart from a pipeline's own sends and receives in the same process group.
TAG = 0x2E60


def is_gloo(process_group: dist.ProcessGroup, device_type: str) -> bool:
    """Whether tensors on `device_type` travel by gloo in `process_group` (a group may have a backend per device)."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config(process_group).split(","))
    if device_type not in backends:
        raise ValueError(f"the process group has no backend for {device_type} tensors, only for {sorted(backends)}")
    return backends[device_type] == "gloo"


def all_gather(rows: Sequence[Tensor], process_group: dist.ProcessGroup) -> list[dist.Work]:
    """Start sending row `rank` to all and receiving the others.

    rows: W dense 1-D tensors, [n_r] on every rank; row `rank` is read, the others are written. Backends other
    than gloo need rows of one length that follow each other in memory.
    """
    rank = process_group.rank()
    if not is_gloo(process_group, rows[0].device.type):
        gathered = rows[0].as_strided((len(rows) * rows[0].numel(),), (1,))
        work = dist.all_gather_into_tensor(gathered, rows[rank], group=process_group, async_op=True)
        return [work] if work is not None else []
    if rows[0].device.type == "cpu":
        return _send_to_all(rows, rank, process_group)
    # gloo sends and receives CPU tensors only; its broadcast takes any.
    works = [
        dist.broadcast(row, group=process_group, group_src=source, async_op=True)
        for source, row in enumerate(rows)
        if row.numel() > 0
    ]
    return [work for work in works if work is not None]


def _send_to_all(rows: Sequence[Tensor], rank: int, process_group: dist.ProcessGroup) -> list[dist.Work]:
    works = []
    for distance in range(1, len(rows)):  # every rank starts with another peer
        target, source = (rank + distance) % len(rows), (rank - distance) % len(rows)
        for piece in rows[source].split(MESSAGE_BYTES // rows[source].element_size()):
            if piece.numel() > 0:
                works.append(dist.irecv(piece, group=process_group, group_src=source, tag=TAG))
        for piece in rows[rank].split(MESSAGE_BYTES // rows[rank].element_size()):
            if piece.numel() > 0:
                works.append(dist.isend(piece, group=process_group, group_dst=target, tag=TAG))
    return [work for work in works if work is not None]
