"""Which parts of rows travel together in one message of bounded size, and the sums of such parts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zeroadam.layout.rows import Rows
from zeroadam.transport.backend import sum_rows


class Message:
    """Runs of rows, of which those of one rank follow each other in a slot."""

    def __init__(self, exchanges: Sequence[Rows], runs: Sequence[tuple[int, int, int]]) -> None:
        self.runs = runs  # (row, start, stop) in elements; a rank whose row is shorter has fewer of them
        ranks = range(len(exchanges[0]))
        self.parts = [[exchanges[row][rank][start:stop] for row, start, stop in runs] for rank in ranks]
        self.numels = [[part.numel() for part in parts] for parts in self.parts]

    def write(self, slot: Tensor, rank: int) -> None:
        """Copy the parts of a rank into a slot, uint8 [n]."""
        target = slot.view(self.parts[rank][0].dtype)[: sum(self.numels[rank])]
        torch.cat(self.parts[rank], out=target)

    def views(self, slot: Tensor, rank: int) -> list[Tensor]:
        """The parts of a rank in a slot, uint8 [n]."""
        numels = self.numels[rank]
        return list(slot.view(self.parts[rank][0].dtype)[: sum(numels)].split(numels))


def cut(exchanges: Sequence[Rows], capacity: int) -> list[Message]:
    """Messages of at most `capacity` bytes for any rank; as many, of the same runs, on every rank."""
    capacity //= exchanges[0].memory.itemsize
    messages: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, rows in enumerate(exchanges):
        start, numel = 0, max(rows.numels)
        while start < numel:
            if room == 0:
                messages.append([])
                room = capacity
            stop = min(numel, start + room)
            messages[-1].append((row, start, stop))
            room -= stop - start
            start = stop
    return [Message(exchanges, runs) for runs in messages]


def sum_lists(rows: Sequence[list[Tensor]], rank: int) -> list[Tensor]:
    """The sums over all ranks, in rank order: in place of this rank's tensors, or in float32 for lower precisions."""
    if rows[rank][0].itemsize < 4:
        return [
            sum_rows(own, [others[index] for other, others in enumerate(rows) if other != rank], rank)
            for index, own in enumerate(rows[rank])
        ]
    total = rows[0]
    for source in range(1, len(rows)):
        if source == rank:  # a + b is b + a
            torch._foreach_add_(rows[rank], total)
            total = rows[rank]
        else:
            torch._foreach_add_(total, rows[source])
    return total
