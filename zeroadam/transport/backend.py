"""The transport of NCCL and of every other backend that is not gloo: the backend's own collectives."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from zeroadam.layout.rows import RowRules, Rows

# Pieces of this size and more are not packed: a message of their own costs less than copying them twice.
DIRECT_BYTES = 256 * 2**10


class Backend:
    """See `zeroadam.transport.Transport`. The order of a sum is the backend's."""

    rules = RowRules(equal=True, direct_bytes=DIRECT_BYTES)
    waits_in_forward = True
    clears_others = False
    same_on_all_ranks = False
    senders = 0  # the sum is taken in place

    def __init__(self, process_group: dist.ProcessGroup, channel: Any = None) -> None:
        self.process_group, self.channel = process_group, channel

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        rank, group = self.process_group.rank(), self.process_group
        calls = [partial(all_gather, rows.whole(), rows[rank], group=group, async_op=True) for rows in exchanges]
        return lambda: [partial(wait_for, [call()]) for call in calls]

    def prepare_reduce(
        self,
        exchanges: Sequence[Rows],
        scratch: Sequence[Sequence[Tensor]],  # noqa: ARG002
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        rank, group = self.process_group.rank(), self.process_group
        calls = [partial(reduce_scatter, rows[rank], rows.whole(), group=group, async_op=True) for rows in exchanges]
        sums = [rows[rank] for rows in exchanges]

        def start() -> Callable[[], list[Tensor]]:
            works = [call() for call in calls]

            def finish() -> list[Tensor]:
                wait_for(works)
                return sums

            return finish

        return start


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


# torch 2.13 has new names for these and warns of the old ones, which are all that 2.11 has.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
