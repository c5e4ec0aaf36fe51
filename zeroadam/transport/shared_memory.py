"""The transport between ranks of one host: rows through shared memory, and headers through pipes that announce them.

Every rank owns a ring of slots that all others have mapped. It writes a message into the next slot of its own, and a
header into a pipe to each other rank; who has read a header of each knows that all have written theirs, and reads from
the others' slots what is for it. Twice as many slots as messages under way make sure that a slot has been read by all
before it is written again: with k messages in flight, message n is written after the headers of message n - k are in,
which the others sent after they had read message n - 2 k.
"""

import contextlib
import os
import select
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from zeroadam.layout.rows import RowRules, Rows
from zeroadam.transport.backend import DIRECT_BYTES
from zeroadam.transport.calls import FAILED, MAX_REFUSALS, REFUSED, Header, Headings, layout_digest
from zeroadam.transport.messages import Message, cut, sum_lists

SLOT_BYTES = 2**20
MESSAGES_IN_FLIGHT = 3
SLOTS = 2 * MESSAGES_IN_FLIGHT
HEADER = struct.Struct("<4I")

Write = Callable[[Tensor], None]
Read = Callable[[Sequence[Tensor]], None]


class SharedMemory:
    """See `zeroadam.transport.Transport`. The slots of some ranks of a process group, and the messages under way.

    Args:
        ranks: of the process group; those below are places among them.
        regions: uint8 [SLOTS * SLOT_BYTES] of each rank.
        pipes: file descriptors to read from and to write to each rank, none for this one; closed with this object.
        timeout: seconds to wait for another rank.
        calls: what the headers say, and whether those of all ranks fit together.
    """

    rules = RowRules(equal=False, direct_bytes=DIRECT_BYTES)
    waits_in_forward = False  # a message moves only while all ranks are at work
    clears_others = True
    same_on_all_ranks = True
    sums_on_device = False
    senders = 0
    waits = True

    def __init__(
        self,
        rank: int,
        ranks: Sequence[int],
        regions: Sequence[Tensor],
        pipes: Mapping[int, tuple[int, int]],
        timeout: float,
        calls: Headings,
    ) -> None:
        self.rank, self.ranks, self.pipes, self.timeout, self.calls = rank, ranks, pipes, timeout, calls
        # By number of the slot, as all ranks use the same at a time: [SLOTS][W] of uint8 [SLOT_BYTES].
        self.slots = list(zip(*(region.view(SLOTS, -1) for region in regions), strict=True))
        self.queued = self.posted = self.read = 0
        # (digest, write, read) of messages for which there was no slot yet; (header, read) of those under way.
        self.queue: deque[tuple[int, Write, Read]] = deque()
        self.under_way: deque[tuple[Header, Read]] = deque()
        self.polls = {other: select.poll() for other in pipes}
        for other, poll in self.polls.items():
            poll.register(pipes[other][0], select.POLLIN)
        weakref.finalize(self, close, [end for ends in pipes.values() for end in ends])

    def post(self, digest: int, write: Write, read: Read) -> None:
        """Send a message: `write` fills this rank's slot, `read` gets those of all ranks when all have written.

        Does not wait: what finds no slot is sent with later messages, or by `finish`. Raises as that.
        """
        self.queue.append((digest, write, read))
        self.queued += 1
        while self.queue and (len(self.under_way) < MESSAGES_IN_FLIGHT or self._first_is_there()):
            self._post_first()

    def finish(self, count: int) -> None:
        """Wait until the first `count` messages ever posted have been read.

        Raises:
            RuntimeError: another rank has ended, failed, or not come in time, or it is in another call.
        """
        while self.read < count:
            while self.queue and len(self.under_way) < MESSAGES_IN_FLIGHT:
                self._post_first()
            self._read_first()

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        """See `zeroadam.transport.Transport`: one function waits for all exchanges, as they share messages."""
        posts, digest = [], layout_digest(exchanges)
        for message in cut(exchanges, SLOT_BYTES):

            def read(slots: Sequence[Tensor], message: Message = message) -> None:
                for rank in self.pipes:
                    torch._foreach_copy_(message.parts[rank], message.views(slots[rank], rank))

            posts.append((partial(message.write, rank=self.rank), read))

        def start() -> list[Callable[[], None]]:
            for write, read in posts:
                self.post(digest, write, read)
            return [partial(self.finish, self.queued)] * len(exchanges)

        return start

    def prepare_reduce(
        self,
        exchanges: Sequence[Rows],
        scratch: Sequence[Sequence[Tensor]],  # noqa: ARG002
        into: Callable[[], Sequence[Tensor | None]] | None = None,
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        """See `zeroadam.transport.Transport`. into: memory for the float32 sums of a reduction, where there is some."""
        own = [rows[self.rank] for rows in exchanges]
        sums: list[Tensor] = []  # of the reduction that is under way
        share = SLOT_BYTES // len(self.pipes) // 64 * 64  # bytes of a slot for each of the others

        def part_of(slot: Tensor, source: int, target: int) -> Tensor:
            index = target if target < source else target - 1
            return slot[index * share : (index + 1) * share]

        posts, digest = [], layout_digest(exchanges)
        for message in cut(exchanges, share):

            def write(slot: Tensor, message: Message = message) -> None:
                for rank in self.pipes:
                    message.write(part_of(slot, self.rank, rank), rank)
                    torch._foreach_zero_(message.parts[rank])  # now, while they are in cache

            def read(slots: Sequence[Tensor], message: Message = message) -> None:
                rows = [
                    message.parts[rank]
                    if rank == self.rank
                    else message.views(part_of(slot, rank, self.rank), self.rank)
                    for rank, slot in enumerate(slots)
                ]
                total = sum_lists(rows, self.rank)
                if total is not rows[self.rank]:
                    for (row, start, stop), part in zip(message.runs, total, strict=True):
                        sums[row][start:stop] = part

            posts.append((write, read))

        def start() -> Callable[[], list[Tensor]]:
            # Float32 sums of lower precisions are made for each reduction, or they would be held for the whole model.
            given = into() if into is not None else [None] * len(own)
            sums[:] = [
                row if row.itemsize >= 4 else torch.empty_like(row, dtype=torch.float32) if memory is None else memory
                for row, memory in zip(own, given, strict=True)
            ]
            for write, read in posts:
                self.post(digest, write, read)
            count = self.queued

            def finish() -> list[Tensor]:
                self.finish(count)
                found = list(sums)
                sums.clear()
                return found

            return finish

        return start

    @property
    def channel(self) -> "SharedMemory":
        return self

    def meet(self) -> None:
        self._announce_alone(self.calls.header(0, self.posted))
        self.finish(self.queued)

    def refuse(self) -> None:
        while len(self.under_way) >= MAX_REFUSALS:
            self._read_first()
        self._announce_alone(self.calls.last_words(REFUSED, self.posted))

    def fail(self) -> None:
        header = HEADER.pack(*self.calls.last_words(FAILED, self.posted))
        for _, target in self.pipes.values():
            with contextlib.suppress(OSError):  # that rank has ended
                os.write(target, header)

    def _post_first(self) -> None:
        while len(self.under_way) >= MESSAGES_IN_FLIGHT:
            self._read_first()
        digest, write, read = self.queue.popleft()
        write(self.slots[self.posted % SLOTS][self.rank])
        self._announce(self.calls.header(digest, self.posted), read)

    def _announce_alone(self, header: Header) -> None:
        self.queued += 1
        self._announce(header, lambda _: None)

    def _announce(self, header: Header, read: Read) -> None:
        for rank, (_, target) in self.pipes.items():
            try:
                os.write(target, HEADER.pack(*header))  # a system call: whoever reads it sees the slot as it is now
            except BrokenPipeError:
                raise RuntimeError(f"rank {self.ranks[rank]} of the process group has ended") from None
        self.under_way.append((header, read))
        self.posted += 1

    def _first_is_there(self) -> bool:
        return all(poll.poll(0) for poll in self.polls.values())

    def _read_first(self) -> None:
        mine, read = self.under_way.popleft()
        theirs: dict[int, Header] = {}
        for rank, (source, _) in self.pipes.items():
            if not self.polls[rank].poll(min(1000 * self.timeout, 2**31 - 1)):
                raise RuntimeError(
                    f"rank {self.ranks[rank]} of the process group did not come within {self.timeout:.0f} s"
                )
            if not (packed := os.read(source, HEADER.size)):
                raise RuntimeError(f"rank {self.ranks[rank]} of the process group has ended")
            theirs[rank] = HEADER.unpack(packed)
        slots = self.slots[self.read % SLOTS]
        self.read += 1  # also if another rank refuses here, as then this message is done with
        self.calls.check(mine, theirs, self.rank)
        read(slots)


def close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)
