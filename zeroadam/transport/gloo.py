"""The transports over gloo's sockets: rows are sent directly, and added up here.

gloo's own reduce-scatter is an all-reduce inside, and its all-gather takes three times as long as the same bytes sent
directly. So every rank sends each of the others its row. Sums are taken in rank order: they do not depend on timing
or on what else is sent.
"""

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.layout.rows import RowRules, Rows
from zeroadam.transport.backend import DIRECT_BYTES, backends, prepare_ordered_reduce, sum_rows, wait_for
from zeroadam.transport.calls import FAILED, MAX_REFUSALS, REFUSED, Calls, Header, digest_of, layout_digest

# Larger messages between two hosts tend to go one direction at a time.
MESSAGE_BYTES = 4 * 2**20
# Keeps our messages apart from a pipeline's own sends and receives in the same process group.
TAG = 0x2E60


class Gloo:
    """Between CPU tensors. See `zeroadam.transport.Transport`. A collective to make."""

    rules = RowRules(equal=False, direct_bytes=DIRECT_BYTES)
    waits_in_forward = True
    clears_others = False
    same_on_all_ranks = True
    sums_on_device = False
    waits = True

    def __init__(self, process_group: dist.ProcessGroup, calls: Calls) -> None:
        self.process_group, self.calls = process_group, calls
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self.senders = self.world_size - 1
        # Of the headers. Rows have tags made of it, of their layout and direction, as gloo ends a process that receives
        # more than it expects. It differs from that of an optimizer that failed and left messages behind.
        tags = [secrets.randbelow(2**31)]
        dist.broadcast_object_list(tags, group=process_group, group_src=0)
        self.tag = tags[0]
        self.headers = 0  # how many have been sent to each of the others
        self.refusals: list[Callable[[], None]] = []
        self.abandoned: list[object] = []  # messages under way after a failure, and the memory that they use

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        digest = layout_digest(exchanges)
        tag = digest_of((self.tag, "gather", digest))
        starts = [self._exchange([rows[self.rank]] * len(rows), list(rows), tag) for rows in exchanges]

        def start() -> list[Callable[[], None]]:
            check = self._send_header(self.calls.header(digest, self.headers))
            return [partial(self._wait, check, start()) for start in starts]

        return start

    def prepare_reduce(
        self, exchanges: Sequence[Rows], scratch: Sequence[Sequence[Tensor]]
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        own, digest = [rows[self.rank] for rows in exchanges], layout_digest(exchanges)
        tag = digest_of((self.tag, "reduce", digest))
        starts = []
        for rows, received in zip(exchanges, scratch, strict=True):
            incoming = [*received[: self.rank], rows[self.rank], *received[self.rank :]]
            starts.append(self._exchange(list(rows), incoming, tag))

        def start() -> Callable[[], list[Tensor]]:
            check = self._send_header(self.calls.header(digest, self.headers))
            works = [work for start in starts for work in start()]

            def finish() -> list[Tensor]:
                self._wait(check, works)
                return [sum_rows(row, received, self.rank) for row, received in zip(own, scratch, strict=True)]

            return finish

        return start

    @property
    def channel(self) -> "Gloo":
        return self

    def meet(self) -> None:
        self._send_header(self.calls.header(0, self.headers))()

    def refuse(self) -> None:
        self.refusals.append(self._send_header(self.calls.last_words(REFUSED, self.headers)))

    def fail(self) -> None:
        self.abandoned.append(self._send_header(self.calls.last_words(FAILED, self.headers)))

    def _wait(self, check: Callable[[], None], works: Sequence[dist.Work]) -> None:
        try:
            self.calls.raise_if_broken()  # or rows may never come
            check()
        except RuntimeError:
            self.abandoned += works
            raise
        wait_for(works)

    def _send_header(self, mine: Header) -> Callable[[], None]:
        """Starts to send a header to all others. Gives a function that waits for theirs and compares, once."""
        while self.refusals and (mine[0] != REFUSED or len(self.refusals) >= MAX_REFUSALS):
            self.refusals.pop(0)()
        self.headers += 1
        sent, others = torch.tensor(mine), [other for other in range(self.world_size) if other != self.rank]
        received = torch.empty(len(others), len(mine), dtype=sent.dtype)
        works = [self.process_group.recv([row], other, self.tag) for row, other in zip(received, others, strict=True)]
        works += [self.process_group.send([sent], other, self.tag) for other in others]

        def check() -> None:
            if works:
                wait_for(works)
                works.clear()
                theirs: list[Header] = [tuple(row) for row in received.tolist()]
                self.calls.check(mine, dict(zip(others, theirs, strict=True)), self.rank)

        return check

    def _exchange(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], tag: int
    ) -> Callable[[], list[dist.Work]]:
        """Starts to send `outgoing[r]` to every other rank r and to receive `incoming[r]`, in messages of a few MB."""
        rank, world_size = self.rank, self.world_size
        calls: list[Callable[[], dist.Work]] = []
        for distance in range(1, world_size):  # every rank starts with another peer
            target, source = (rank + distance) % world_size, (rank - distance) % world_size
            for message in messages(incoming[source]):
                calls.append(partial(self.process_group.recv, [message], source, tag))
            for message in messages(outgoing[target]):
                calls.append(partial(self.process_group.send, [message], target, tag))
        return lambda: [call() for call in calls]


class GlooOnDevice:
    """Between tensors of other devices, which gloo takes in its collectives only. See `Transport`."""

    rules = Gloo.rules
    waits_in_forward = True
    clears_others = False
    same_on_all_ranks = True
    sums_on_device = False

    def __init__(self, process_group: dist.ProcessGroup, channel: Any = None) -> None:
        self.process_group, self.channel, self.senders = process_group, channel, process_group.size()

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        def start(rows: Rows) -> Callable[[], None]:
            works = [
                dist.broadcast(row, group=self.process_group, group_src=source, async_op=True)
                for source, row in enumerate(rows)
                if row.numel() > 0
            ]
            return partial(wait_for, works)

        return lambda: [start(rows) for rows in exchanges]

    def prepare_reduce(
        self, exchanges: Sequence[Rows], scratch: Sequence[Sequence[Tensor]]
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        return prepare_ordered_reduce(self.process_group, exchanges, scratch)


def gather_to(piece: Tensor, pieces: Sequence[Tensor], to: int, process_group: dist.ProcessGroup) -> None:
    """Copy the piece [c, ...] of each rank r to `pieces[r]` on rank `to`, of any strides and on the CPU. Waits for it.

    No rank needs more memory for it than one piece.
    """
    rank = process_group.rank()
    device = torch.device("cpu") if "cpu" in backends(process_group) else piece.device
    if rank != to:
        _transfer(dist.isend, piece.to(device).contiguous().view(-1), to, process_group)
        return
    for source, target in enumerate(pieces):
        if source == rank:
            target.copy_(piece)
            continue
        direct = target.is_contiguous() and device.type == "cpu"
        received = target if direct else torch.empty(target.shape, dtype=target.dtype, device=device)
        _transfer(dist.irecv, received.view(-1), source, process_group)
        if not direct:
            target.copy_(received)


def _transfer(call: Callable[..., Any], row: Tensor, peer: int, process_group: dist.ProcessGroup) -> None:
    """Send a row to, or receive it from, a rank of the process group, and wait until that is done."""
    if not row.numel():
        return
    if backends(process_group)[row.device.type] == "gloo":
        start = process_group.send if call is dist.isend else process_group.recv
        wait_for([start([message], peer, TAG) for message in messages(row)])
    else:  # as a batch, since NCCL makes a communicator for each pair of ranks that send to each other otherwise
        wait_for(dist.batch_isend_irecv([dist.P2POp(call, row, group=process_group, group_peer=peer)]))


def messages(row: Tensor) -> Sequence[Tensor]:
    """A row in messages of a few MB; none of an empty row."""
    return row.split(MESSAGE_BYTES // row.element_size()) if row.numel() > 0 else ()
