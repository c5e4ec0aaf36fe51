"""The transport of hybrid sharding: rows travel inside a shard group, and their sums are added up over its replicas.

A reduction is that of the shard group, then an all-reduce of what this rank owns, with the ranks of the same place in
the other shard groups. Two replicas over sockets swap their rows, and each adds them up. Otherwise each of R replicas
gets 1/R of the row, adds it up, and gives the sum to all. Both add in the order of the replicas, or host by host where
only some of them share a host, so that all have the same bits. Two threads of each rank do this under backward, one
inside the shard group and one across, where a few MB after the other are under way at once. A gather stays inside the
shard group.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from zeroadam._compat import timeout_of
from zeroadam.layout.rows import Rows
from zeroadam.layout.shard import shard_range
from zeroadam.transport.alone import Alone
from zeroadam.transport.gloo import Gloo
from zeroadam.transport.jobs import Job, start_thread
from zeroadam.transport.pool import Pool
from zeroadam.transport.shared_memory import SharedMemory

RUN_BYTES = 2 * 2**20  # of this rank's rows: when so many have been added up in the shard group, they cross
BLOCK_BYTES = 4 * 2**20  # of sums, that are added up over the replicas together

Inner = Gloo | SharedMemory | Alone


class Groups(NamedTuple):
    """The process groups of hybrid sharding."""

    shards: dist.ProcessGroup  # over which state is cut
    replicas: dist.ProcessGroup  # of the ranks with this one's place in theirs
    everyone: dist.ProcessGroup


def groups_of(device_mesh: DeviceMesh, process_group: dist.ProcessGroup | None) -> Groups:
    """The groups of a mesh [R, S]. process_group: what was given beside it.

    Raises:
        ValueError: it is no such mesh of all ranks, or there is something beside it.
    """
    if process_group is not None:
        raise ValueError("device_mesh= and process_group= both say over which ranks to cut the state: give one of them")
    if device_mesh.ndim != 2 or device_mesh.mesh_dim_names == ("shard", "replicate"):
        raise ValueError(
            f"device_mesh has the dimensions {device_mesh.mesh_dim_names or device_mesh.ndim}: make it by "
            'init_device_mesh(device_type, (R, S), mesh_dim_names=("replicate", "shard"))'
        )
    if device_mesh.size() != dist.get_world_size():
        raise ValueError(f"device_mesh is of {device_mesh.size()} ranks: make one of all {dist.get_world_size()}")
    rows = device_mesh.mesh.tolist()
    columns = [list(column) for column in zip(*rows, strict=True)]
    if any(line != sorted(line) for line in (*rows, *columns)):
        raise ValueError(
            f"the ranks of device_mesh do not ascend: {rows}; process groups sort theirs, so make one whose rows and "
            "columns do, as init_device_mesh does"
        )
    everyone = dist.group.WORLD
    assert everyone is not None
    # Its own groups may have another timeout than that which the program has set for all ranks.
    seconds = timeout_of(everyone, "cpu")
    key = (tuple(map(tuple, rows)), seconds)
    if any(groups.everyone is not everyone for groups in _groups.values()):
        _groups.clear()  # of a world that is gone
    if key not in _groups:
        own = [_group_of(lines, timedelta(seconds=seconds)) for lines in (rows, columns)]
        _groups[key] = Groups(own[0], own[1], everyone)
    return _groups[key]


# By the ranks of a mesh and the timeout: alike on all ranks, whenever their meshes are collected.
_groups: dict[tuple[Any, float], Groups] = {}


def _group_of(lines: Sequence[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """A process group for each line of ranks, made by all ranks; gives the one that this rank is in."""
    groups = [dist.new_group(line, timeout=timeout) for line in lines]
    own: dist.ProcessGroup
    [own] = [group for line, group in zip(lines, groups, strict=True) if dist.get_rank() in line]
    return own


class Everyone:
    """See `zeroadam.transport.Channel`. Ranks meet all others; who fails tells those that wait for its rows as well."""

    waits = True

    def __init__(self, meeting: Gloo, *inner: Inner) -> None:
        self.meeting = meeting
        self.channels = [meeting, *(transport.channel for transport in inner if transport.channel is not None)]
        self.meet, self.refuse = meeting.meet, meeting.refuse

    def fail(self) -> None:
        for channel in self.channels:
            with contextlib.suppress(RuntimeError):  # where a connection is gone, which tells them as well
                channel.fail()


class Hybrid:
    """See `zeroadam.transport.Transport`.

    Sums of a shard group go to the replicas in the dtype of the rows, as within it; those over all in float32 at least.

    Args:
        shards, replicas: between CPU tensors, over gloo.
        groups: of which they are.
        exact: whether sums of lower precisions go to the replicas in float32.
    """

    same_on_all_ranks = True
    sums_on_device = False

    def __init__(self, shards: Inner, replicas: Inner, groups: Groups, channel: Everyone, exact: bool) -> None:
        self.shards, self.replicas, self.channel, self.exact = shards, replicas, channel, exact
        self.count, self.replica = groups.replicas.size(), groups.replicas.rank()
        self.rules, self.senders, self.waits_in_forward = shards.rules, shards.senders, shards.waits_in_forward
        self.clears_others = shards.clears_others
        self.prepare_gather = shards.prepare_gather
        self.jobs, self.crossing = start_thread(self), start_thread(self)
        self.pool = Pool()

    def prepare_reduce(
        self, exchanges: Sequence[Rows], scratch: Sequence[Sequence[Tensor]]
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        # A few MB after the other, so that the first cross while the next are added up in the shard group.
        starts, first, nbytes = [], 0, 0
        for index, rows in enumerate(exchanges, start=1):
            nbytes += max(rows.numels) * rows.memory.itemsize
            if nbytes >= RUN_BYTES or index == len(exchanges):
                starts.append(self._prepare_run(exchanges[first:index], scratch[first:index]))
                first, nbytes = index, 0

        def start() -> Callable[[], list[Tensor]]:
            finishes = [start() for start in starts]
            return lambda: [row for finish in finishes for row in finish()]

        return start

    def _prepare_run(
        self, exchanges: Sequence[Rows], scratch: Sequence[Sequence[Tensor]]
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        reduce = self.shards.prepare_reduce(exchanges, scratch)
        dtype = exchanges[0].memory.dtype
        wire = torch.float32 if self.exact and dtype.itemsize < 4 else dtype
        total = wire if wire.itemsize >= 4 else torch.float32
        swaps = isinstance(self.replicas, Gloo) and self.count == 2  # whatever the dtype, or two threads would send

        def start() -> Callable[[], list[Tensor]]:
            own: list[Tensor] = []  # sums of the shard group
            sums: list[Tensor] = []
            swapped: list[Callable[[], None]] = []

            def inside() -> None:
                own.extend(reduce()())
                sums.extend(row if row.itemsize >= 4 else torch.empty_like(row, dtype=torch.float32) for row in own)
                if swaps:  # the next row is sent while this one is waited for
                    swapped.append(self._swap(own, sums, wire))
                self.crossing.put(across)

            def outside() -> None:
                if swaps:
                    swapped.pop()()
                else:
                    self._reduce_and_gather(own, sums, wire, total)

            job, across = Job([inside], _ignore), Job([outside], _ignore)
            self.jobs.put(job)

            def finish() -> list[Tensor]:
                job.wait(1)
                across.wait(1)
                return sums

            return finish

        return start

    def _swap(self, own: list[Tensor], sums: list[Tensor], wire: torch.dtype) -> Callable[[], None]:
        """Start to send this rank's sums to all replicas; gives a function that adds theirs up into `sums`."""
        numels = [row.numel() for row in own]
        numel, dtype = sum(numels), torch.float32 if wire.itemsize < 4 else wire
        memory = self.pool.take(self.count * numel * wire.itemsize)
        flat = memory.view(wire)[: self.count * numel]
        rows = list(flat.view(self.count, numel))
        if own:
            torch._foreach_copy_(list(rows[self.replica].split(numels)), own)
        runs = [(start, stop) for start, stop, _ in _blocks(numel, BLOCK_BYTES // wire.itemsize, self.count)]
        blocks = [Rows(flat[start:], numel, [stop - start] * self.count) for start, stop in runs]
        waits = self.replicas.prepare_gather(blocks)()

        def finish() -> None:
            total = rows[0] if dtype == wire else torch.empty(numel, dtype=dtype)
            for (start, stop), wait in zip(runs, waits, strict=True):
                wait()
                if dtype != wire:
                    total[start:stop].copy_(rows[0][start:stop])
                for row in rows[1:]:
                    total[start:stop] += row[start:stop]
            if own:
                torch._foreach_copy_(sums, list(total.split(numels)))
            self.pool.give_back(memory)

        return finish

    def _reduce_and_gather(self, own: list[Tensor], sums: list[Tensor], wire: torch.dtype, total: torch.dtype) -> None:
        """The sums of `own` over the replicas, each of which adds up a part of the rows."""
        numels = [row.numel() for row in own]
        runs = list(_blocks(sum(numels), BLOCK_BYTES // total.itemsize, self.count))
        mine = [pieces[self.replica] for _, _, pieces in runs]
        needed = [(sum(numels), wire), (self.replicas.senders * sum(mine), wire), (sum(numels), total)]
        memories = [self.pool.take(numel * kind.itemsize) for numel, kind in needed]
        row, received, whole = (
            memory.view(kind)[:numel] for memory, (numel, kind) in zip(memories, needed, strict=True)
        )
        if total == wire:
            whole = row
        if own:
            torch._foreach_copy_(list(row.split(numels)), own)
        finishes = []
        for (start, stop, pieces), scratch in zip(
            runs, received.split([self.replicas.senders * n for n in mine]), strict=True
        ):
            rows = Rows(row[start:stop], pieces[0], pieces)
            lines = list(scratch.view(self.replicas.senders, -1)) if self.replicas.senders else []
            finishes.append(self.replicas.prepare_reduce([rows], [lines])())
        waits = []
        for (start, stop, pieces), finish in zip(runs, finishes, strict=True):
            rows, (summed,) = Rows(whole[start:stop], pieces[0], pieces), finish()
            if summed.data_ptr() != rows[self.replica].data_ptr():
                rows[self.replica].copy_(summed)
            waits += self.replicas.prepare_gather([rows])()
        for wait in waits:
            wait()
        if own:
            torch._foreach_copy_(sums, list(whole.split(numels)))
        for memory in reversed(memories):
            self.pool.give_back(memory)


def _blocks(numel: int, at_most: int, count: int) -> Iterator[tuple[int, int, list[int]]]:
    """(start, stop, elements of each replica) of runs of a row."""
    for start in range(0, numel, at_most):
        stop = min(start + at_most, numel)
        yield start, stop, [shard_range(stop - start, count, replica)[1] for replica in range(count)]


def _ignore(error: Exception) -> None:
    """Nothing, as who waits for a job gets its error, and tells the other ranks."""
