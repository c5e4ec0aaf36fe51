"""How rows travel between the ranks: one object for each device type, chosen once.

A new transport is one new file with a class that fits `Transport`, and one line in `choose`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.layout.rows import RowRules, Rows
from zeroadam.transport.alone import Alone
from zeroadam.transport.backend import Backend, OrderedBackend, backend_of, backends
from zeroadam.transport.calls import BACKWARD, CHECK_CALLS, Calls, DisagreementError, RefusedError
from zeroadam.transport.gloo import Gloo, GlooOnDevice
from zeroadam.transport.headers import Headers
from zeroadam.transport.hosts import find_hosts
from zeroadam.transport.hybrid import Everyone, Groups, Hybrid, Inner
from zeroadam.transport.two_level import TwoLevel

Wait = Callable[[], None]
Sums = Callable[[], list[Tensor]]


class Transport(Protocol):
    """Moves rows between the ranks of a process group. All ranks make the same calls in the same order.

    `prepare_gather` and `prepare_reduce` do once what depends only on where the rows lie. What they return starts one
    exchange each time it is called, without waiting for it.
    """

    rules: RowRules  # what the rows must be like
    waits_in_forward: bool  # whether a gather arrives although the other ranks have gone on to something else
    clears_others: bool  # whether a reduction leaves zero in the rows of the other ranks
    same_on_all_ranks: bool  # whether every rank that sums a row gets the same bits
    sums_on_device: bool  # whether a sum needs nothing of the host, so that to wait early only holds the device up
    senders: int  # rows of scratch memory that a reduction needs for each row: one for each rank that it receives from

    @property
    def channel(self) -> "Channel | None":
        """What takes headers: the transport itself, where they come with its rows, or something beside it."""

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Wait]]:
        """Of each exchange: send row `rank` to all ranks, receive theirs. Gives one function that waits for each."""

    def prepare_reduce(self, exchanges: Sequence[Rows], scratch: Sequence[Sequence[Tensor]]) -> Callable[[], Sums]:
        """Of each exchange: send row r to rank r, receive theirs. Gives a function that waits for them and adds up.

        The sum over the ranks, [numels[rank]] of each exchange, is in row `rank`, or in float32 if the rows are of a
        lower precision. scratch: `senders` tensors like row `rank` for each exchange. All are in use until the sums
        are there.
        """


class Channel(Protocol):
    """Takes headers from each rank to all others."""

    waits: bool  # whether ranks meet; if not, `meet` raises in a later call, when nothing can go on

    def meet(self) -> None:
        """Wait until all ranks are in this call; raises as `zeroadam.transport.calls.Calls.check`."""

    def refuse(self) -> None:
        """In place of `meet`: tell the other ranks that this one refuses the call. Does not wait for them."""

    def fail(self) -> None:
        """Tell the other ranks that this one has failed half-way in a call. Does not wait, and does not raise."""


def choose(
    process_group: dist.ProcessGroup, device: torch.device, calls: Calls, ordered_sums: bool = False
) -> Transport:
    """The transport for tensors on a device. A collective.

    ordered_sums: whether sums are taken in rank order and float32 whatever the backend, across hosts as well.

    Raises:
        ValueError: the process group has no backend for them.
    """
    if process_group.size() == 1:
        return Alone()
    backend = backend_of(process_group, device.type)
    if backend != "gloo" or device.type != "cpu":
        channel: Channel | None = None
        if os.environ.get(CHECK_CALLS) == "0":
            pass
        elif backends(process_group).get("cpu") == "gloo":
            channel = Gloo(process_group, calls)
        elif backend != "gloo":
            channel = Headers(process_group, device, calls, waits=device.type == "cpu")
        if backend == "gloo":
            return GlooOnDevice(process_group, channel)
        return (OrderedBackend if ordered_sums else Backend)(process_group, channel)
    hosts = find_hosts(process_group)
    if len(hosts.ranks) == 1:
        return hosts.open(calls)
    if len(hosts.ranks) == process_group.size():
        return Gloo(process_group, calls)
    return TwoLevel(process_group, calls, hosts, exact=ordered_sums)


def row_rules(backend: str, world_size: int) -> RowRules:
    """Of the transport that `choose` takes for tensors on the device type of a backend."""
    return Alone.rules if world_size == 1 else Gloo.rules if backend == "gloo" else Backend.rules


def choose_hybrid(groups: Groups, device: torch.device, calls: Calls, ordered_sums: bool = False) -> Hybrid:
    """The transport for tensors on a device, of hybrid sharding. A collective of all ranks.

    Raises:
        ValueError: they are not on the CPU, or not over gloo.
    """
    if device.type != "cpu" or any(backends(group).get("cpu") != "gloo" for group in groups):
        raise ValueError(
            f"device_mesh= is for CPU tensors over gloo, not for {device.type} tensors over "
            f"{backends(groups.shards).get(device.type)}: give process_group=device_mesh.get_group(1) in its place and "
            "register no hook (hook=None), so that DistributedDataParallel averages over all ranks"
        )
    shards = choose(groups.shards, device, calls, ordered_sums)
    replicas = choose(groups.replicas, device, calls, ordered_sums)
    assert isinstance(shards, Inner)
    assert isinstance(replicas, Inner)
    channel = Everyone(Gloo(groups.everyone, calls), shards, replicas)
    return Hybrid(shards, replicas, groups, channel, ordered_sums)


class Transports:
    """The transports of one process group, by device type, and the calls in which they are used.

    groups: of hybrid sharding, of which the first is the process group.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, ordered_sums: bool = False, groups: Groups | None = None
    ) -> None:
        self.process_group, self.ordered_sums, self.calls = process_group, ordered_sums, Calls()
        self.groups, self.told = groups, False
        self.size = process_group.size() * (groups.replicas.size() if groups is not None else 1)
        self.replica = groups.replicas.rank() if groups is not None else 0
        self._chosen: dict[str, Transport] = {}

    def of(self, device: torch.device) -> Transport:
        """That for tensors on a device. A collective the first time for each type."""
        if device.type not in self._chosen:
            if self.groups is None:
                chosen = choose(self.process_group, device, self.calls, self.ordered_sums)
            else:
                chosen = choose_hybrid(self.groups, device, self.calls, self.ordered_sums)
            self._chosen[device.type] = chosen
        return self._chosen[device.type]

    def begin(self, kind: int) -> None:
        """Begin a call. Raises if none can be made any more, and as `meet` where headers do not come with rows."""
        self.calls.begin(kind)
        if kind == BACKWARD and all(cast(object, t.channel) is not t for t in self._chosen.values()):
            self.meet()

    def meet(self) -> None:
        """Wait until all ranks are in this call, and agree on its digest; nothing has been changed then.

        Raises as `zeroadam.transport.calls.Calls.check`.
        """
        try:
            for channel in self._channels()[:1]:
                channel.meet()
        except (RefusedError, DisagreementError):
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def refuse(self) -> None:
        for channel in self._channels()[:1]:
            channel.refuse()

    def fail(self, error: BaseException) -> None:
        """End all further calls, and those of the other ranks, after an error half-way in one."""
        known = self.calls.broken is not None  # by others as well, but for those of other groups than who told it
        self.calls.broken = self.calls.broken or f"{type(error).__name__}: {error}" if self.size > 1 else None
        if self.size > 1 and not self.told and (not known or self.groups is not None):
            self.told = True
            for channel in self._channels():
                channel.fail()

    @property
    def can_meet(self) -> bool:
        """Whether ranks compare headers before a call changes anything."""
        return any(channel.waits for channel in self._channels())

    def _channels(self) -> list[Channel]:
        return [transport.channel for transport in self._chosen.values() if transport.channel is not None]
