"""The transport between several hosts with several ranks on some: within a host through memory, across it by sockets.

Reduction: through shared memory each rank gets, from the ranks of its host, what it passes on (see
`zeroadam.transport.carriers`), and adds it up in rank order: its host's partial sums. It sends them to the owners of
the rows, which add up those of the hosts, in the order of their first rank. A gather goes the other way: every row
crosses once to each other host, to its carriers there, which spread it through shared memory. So a host with any
number of ranks sends and receives each row once.

What a carrier has to do must not wait until its own program comes to it. A thread of each rank does it, one exchange
after the other; the thread that calls sends what comes from this rank alone, and the headers, which go to all ranks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.layout.rows import Rows
from zeroadam.transport import shared_memory
from zeroadam.transport.backend import sum_rows, wait_for
from zeroadam.transport.calls import FAILED, NOTHING, Calls, Header, digest_of, layout_digest
from zeroadam.transport.carriers import Carriage, carriages
from zeroadam.transport.gloo import Gloo
from zeroadam.transport.hosts import Hosts
from zeroadam.transport.jobs import Job, start_thread
from zeroadam.transport.pool import Pool


class TwoLevel(Gloo):
    """See `zeroadam.transport.Transport`. A collective to make.

    Partial sums cross in the dtype of the rows, those of bfloat16 and float16 rounded to it once: the bytes of a
    lower precision are what it is chosen for.

    Args:
        exact: whether partial sums of lower precisions cross in float32.
    """

    waits_in_forward = True
    clears_others = True

    def __init__(self, process_group: dist.ProcessGroup, calls: Calls, hosts: Hosts, exact: bool = False) -> None:
        super().__init__(process_group, calls)
        self.senders = 0
        self.hosts, self.exact = hosts, exact
        self.place, self.host = hosts.place, hosts.ranks[hosts.index]
        self.local = hosts.open(Within(self.host)) if len(self.host) > 1 else None
        self.lost: Exception | None = None  # why this rank's thread does nothing any more
        self.jobs = start_thread(self)
        self.pool = Pool()

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        found = carriages(exchanges, self.hosts.ranks, self.rank, shared_memory.SLOT_BYTES, shared=True)
        digest = layout_digest(exchanges)
        tag = digest_of((self.tag, "gather", digest))
        # For each exchange, how many messages there are up to its end.
        last = ends_of(exchanges, found)

        def start() -> list[Callable[[], None]]:
            check = self._send_header(self.calls.header(digest, self.headers))
            receive, send = self.process_group.recv, self.process_group.send
            steps, outgoing = [], []
            for one in found:
                incoming = [receive([view], owner, tag) for owner, _, _, views in one.carried for view in views]
                steps.append(partial(self._spread, one, incoming, digest))
                outgoing.append([send([view], c, tag) for _, c, a, b in one.crossing for view in one.own(a, b)])
            job = Job(steps, self.give_up)
            self.jobs.put(job)
            return [partial(self._arrive, check, job, end, outgoing) for end in last]

        return start

    def prepare_reduce(
        self,
        exchanges: Sequence[Rows],
        scratch: Sequence[Sequence[Tensor]],  # noqa: ARG002
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        found = carriages(exchanges, self.hosts.ranks, self.rank, shared_memory.SLOT_BYTES, shared=False)
        digest, dtype = layout_digest(exchanges), exchanges[0].memory.dtype
        tag = digest_of((self.tag, "reduce", digest))
        wire = torch.float32 if self.exact and dtype.itemsize < 4 else dtype
        own = [rows[self.rank] for rows in exchanges]
        # Of each host, its sum of this rank's rows; and what goes to the owners of others.
        sizes = [sum(row.numel() for row in own)] * len(self.hosts.ranks)
        sizes.append(found[-1].carried_range[1] if found else 0)

        def start() -> Callable[[], list[Tensor]]:
            check = self._send_header(self.calls.header(digest, self.headers))
            memory = self.pool.take(sum(sizes) * wire.itemsize)
            *partials, sent = memory.view(wire)[: sum(sizes)].split(sizes)
            receive = self.process_group.recv
            incoming = [[receive([partials[h][a:b]], c, tag) for h, c, a, b in one.crossing] for one in found]
            outgoing: list[dist.Work] = []
            mine = partials.pop(self.hosts.index)
            job = Job([partial(self._add_up, found, mine, sent, outgoing, tag, digest)], self.give_up)
            self.jobs.put(job)

            def finish() -> list[Tensor]:
                self._settle(check, job, 1, incoming)
                sums = [row if row.itemsize >= 4 else torch.empty_like(row, dtype=torch.float32) for row in own]
                for one, works in zip(found, incoming, strict=True):
                    self._wait_for(works)
                    run = slice(*one.own_range)
                    total = sum_rows(mine[run], [row[run] for row in partials], self.hosts.index)
                    targets = [sums[row][start:stop] for row, start, stop in one.runs]
                    torch._foreach_copy_(targets, list(total.split([target.numel() for target in targets])))
                self._wait_for(outgoing)
                self.pool.give_back(memory)
                return sums

            return finish

        return start

    def fail(self) -> None:
        with contextlib.suppress(RuntimeError):  # where there are no connections any more, which tells them as well
            super().fail()

    def _add_up(
        self, found: Sequence[Carriage], mine: Tensor, sent: Tensor, outgoing: list[dist.Work], tag: int, digest: int
    ) -> None:
        """This host's sums of the loads of this rank; starts to send what it carries."""
        share = shared_memory.SLOT_BYTES // max(len(self.host) - 1, 1) // 64 * 64

        def load_of(slot: Tensor, source: int, target: int, one: Carriage) -> Tensor:
            index = target if target < source else target - 1
            return slot[index * share :].view(mine_dtype)[: one.numels[target]]

        mine_dtype = found[0].own_parts[0].dtype if found else mine.dtype
        for one in found:

            def write(slot: Tensor, one: Carriage = one) -> None:
                for place, load in enumerate(one.loads):
                    if place != self.place:
                        torch.cat(load, out=load_of(slot, self.place, place, one))
                        torch._foreach_zero_(load)

            def read(slots: Sequence[Tensor], one: Carriage = one) -> None:
                others = [load_of(slot, r, self.place, one) for r, slot in enumerate(slots) if r != self.place]
                total = sum_rows(torch.cat(one.loads[self.place]), others, self.place)
                (start, stop), (carried_start, carried_stop) = one.own_range, one.carried_range
                mine[start:stop] = total[: stop - start]
                sent[carried_start:carried_stop] = total[stop - start :]
                if one.carried_parts[self.place]:
                    torch._foreach_zero_(one.carried_parts[self.place])
                outgoing.extend(self.process_group.send([sent[a:b]], owner, tag) for owner, a, b, _ in one.carried)

            if self.local is None:
                read([])
            else:
                self.local.post(digest, write, read)
        if self.local is not None:
            self.local.finish(self.local.queued)

    def _spread(self, one: Carriage, incoming: Sequence[dist.Work], digest: int) -> None:
        """Wait for what this rank carries, give it to its host with its own, and take theirs."""
        wait_for(incoming)
        if self.local is None:
            return

        def load_of(slot: Tensor, place: int) -> Tensor:
            return slot.view(one.own_parts[0].dtype)[: one.numels[place]]

        def write(slot: Tensor) -> None:
            torch.cat(one.loads[self.place], out=load_of(slot, self.place))

        def read(slots: Sequence[Tensor]) -> None:
            for place, slot in enumerate(slots):
                if place != self.place:
                    views = one.loads[place]
                    torch._foreach_copy_(views, list(load_of(slot, place).split([view.numel() for view in views])))

        self.local.post(digest_of((digest, "gather")), write, read)
        self.local.finish(self.local.queued)

    def _arrive(self, check: Callable[[], None], job: Job, end: int, outgoing: list[list[dist.Work]]) -> None:
        """Wait until the first `end` messages of a gather are there, and this rank's own have left."""
        self._settle(check, job, end, outgoing)
        for works in outgoing[:end]:
            self._wait_for(works)
            works.clear()

    def _settle(self, check: Callable[[], None], job: Job, steps: int, works: Sequence[Sequence[dist.Work]]) -> None:
        """Compare the headers of an exchange; only then wait for steps of it, which else may never be taken."""
        try:
            with self._tells_who():
                self._wait(check, [])
                job.wait(steps)
        except RuntimeError:
            self.abandoned += works
            raise

    def _wait_for(self, works: Sequence[dist.Work]) -> None:
        with self._tells_who():
            wait_for(works)

    @contextlib.contextmanager
    def _tells_who(self) -> Iterator[None]:
        """Where this rank has ended its connections, as it has lost another, raise which one that was."""
        try:
            yield
        except RuntimeError as error:
            if self.lost is None or isinstance(self.lost, OutOfStepError):
                raise
            raise RuntimeError(str(self.lost)) from error

    def give_up(self, error: Exception) -> None:
        """End what other ranks wait for from this one, as it has lost one of them itself."""
        self.lost = error
        if isinstance(error, OutOfStepError) or self.calls.broken is not None:
            return  # which the headers between all ranks tell
        if self.local is not None:
            self.local.fail()
        for other in range(self.process_group.size()):
            if other != self.rank:  # a wait that takes too long closes all connections; gloo has no other way
                with contextlib.suppress(RuntimeError):
                    self.process_group.recv([torch.empty(1)], other, self.tag + 1).wait(timedelta(milliseconds=1))
                return


class OutOfStepError(RuntimeError):
    """The ranks of a host are in other calls; their headers to all ranks say in which."""


class Within:
    """What the headers within a host say: which exchange it is. The calls are compared between all ranks, beside them.

    Args:
        ranks: of the host.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks

    def header(self, digest: int, count: int) -> Header:
        return NOTHING, 0, digest, count % 2**31

    def check(self, mine: Header, theirs: Mapping[int, Header], rank: int) -> None:  # noqa: ARG002
        for place, header in theirs.items():
            if header[0] == FAILED:
                raise RuntimeError(f"rank {self.ranks[place]} of the process group has ended or lost another one")
            if header != mine:
                raise OutOfStepError(f"rank {self.ranks[place]} of the process group is in another call")

    def last_words(self, kind: int, count: int) -> Header:
        return kind, 0, 0, count % 2**31


def ends_of(exchanges: Sequence[Rows], found: Sequence[Carriage]) -> list[int]:
    """For each exchange, after how many messages it is there."""
    ends = [0] * len(exchanges)
    for count, one in enumerate(found, start=1):
        for row, _, _ in one.runs:
            ends[row] = count
    return ends
