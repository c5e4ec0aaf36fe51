"""Who passes a row on between hosts: arithmetic, no communication.

Between two hosts every row crosses once. The rows that belong to the ranks of one of them, laid end to end, are cut
into as many equal parts as the other has ranks, its carriers: with as many ranks on both, the carrier of a row has the
place of its owner. A carrier sends its host's sums of its part to the owners, and later receives their rows.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from zeroadam.layout.rows import Rows
from zeroadam.transport.messages import Message, cut


class Part(NamedTuple):
    """The part of the row of `owner` that `carrier` passes on: from `low` to `high` of `whole` equal ones."""

    owner: int
    carrier: int
    low: int
    high: int
    whole: int

    def of(self, numel: int) -> tuple[int, int]:
        """(start, stop) in a row of so many elements."""
        return numel * self.low // self.whole, numel * self.high // self.whole


def parts_between(owners: Sequence[int], carriers: Sequence[int]) -> list[Part]:
    """Of the rows of one host's ranks for the ranks of another."""
    whole, parts = len(carriers), []
    for place, owner in enumerate(owners):
        for index, carrier in enumerate(carriers):
            low = max(place * whole, index * len(owners)) - place * whole
            high = min((place + 1) * whole, (index + 1) * len(owners)) - place * whole
            if low < high:
                parts.append(Part(owner, carrier, low, high, whole))
    return parts


class Carriage:
    """What one rank has to do with one message: where it reads, writes, sends and receives.

    On its host every rank has a load: its own part of the message, then what it carries. [n] each.

    Args:
        hosts: the ranks of each.
        rank: this one.
        own_at, carried_at: elements of its own and of carried ones in the messages before.
    """

    def __init__(
        self, message: Message, hosts: Sequence[Sequence[int]], rank: int, own_at: int, carried_at: int
    ) -> None:
        host = next(index for index, ranks in enumerate(hosts) if rank in ranks)
        remote = [ranks for index, ranks in enumerate(hosts) if index != host]
        numels = [sum(of_one) for of_one in message.numels]
        parts = [part for ranks in remote for part in parts_between(ranks, hosts[host])]
        self.runs = message.runs
        self.own_parts = message.parts[rank]
        self.carried_parts: list[list[Tensor]] = []  # by each rank of this host: views of the rows of other hosts
        # By this rank: (owner, start, stop) among all that it carries, and where these lie.
        self.carried: list[tuple[int, int, int, list[Tensor]]] = []
        self.loads: list[list[Tensor]] = []  # of each rank of this host
        self.numels: list[int] = []
        at = carried_at
        for local in hosts[host]:
            carried = []
            for part in parts:
                start, stop = part.of(numels[part.owner])
                if part.carrier == local and start < stop:
                    views = slices(message.parts[part.owner], start, stop)
                    carried += views
                    if local == rank:
                        self.carried.append((part.owner, at, at + stop - start, views))
                        at += stop - start
            self.carried_parts.append(carried)
            self.loads.append([*message.parts[local], *carried])
            self.numels.append(sum(view.numel() for view in self.loads[-1]))
        self.own_range = (own_at, own_at + numels[rank])  # among all of its own
        self.carried_range = (carried_at, at)
        # Of its own row, what others carry: (host, carrier, start, stop) among all of its own.
        self.crossing: list[tuple[int, int, int, int]] = []
        for index, ranks in enumerate(hosts):
            for part in parts_between(hosts[host], ranks) if index != host else []:
                start, stop = part.of(numels[rank])
                if part.owner == rank and start < stop:
                    self.crossing.append((index, part.carrier, own_at + start, own_at + stop))

    def own(self, start: int, stop: int) -> list[Tensor]:
        """A part of `crossing` where it lies."""
        return slices(self.own_parts, start - self.own_range[0], stop - self.own_range[0])


def carriages(
    exchanges: Sequence[Rows], hosts: Sequence[Sequence[int]], rank: int, slot_bytes: int, shared: bool
) -> list[Carriage]:
    """What a rank has to do for some exchanges: the same messages on all ranks, in the same order.

    shared: whether a slot has room for one load, or, for a reduction, for one of each other rank of a host.
    """
    world_size = sum(map(len, hosts))
    capacity = min(
        (slot_bytes // (1 if shared else len(ranks) - 1) - 64 - 8 * world_size) * len(ranks) // world_size
        for ranks in hosts
        if len(ranks) > 1
    )
    found: list[Carriage] = []
    own_at = carried_at = 0
    for message in cut(exchanges, capacity):
        found.append(Carriage(message, hosts, rank, own_at, carried_at))
        own_at, carried_at = found[-1].own_range[1], found[-1].carried_range[1]
    return found


def slices(parts: Iterable[Tensor], start: int, stop: int) -> list[Tensor]:
    """The elements from start to stop of tensors [n] laid end to end."""
    found, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, part.numel())
        if low < high:
            found.append(part[low:high])
        at += part.numel()
    return found
