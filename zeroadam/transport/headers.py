"""Headers through a backend that has no messages between CPU tensors, such as NCCL: an all-gather of its own.

On the CPU a call waits for the headers of all ranks before it changes anything. On a GPU that would hold the host up
until the device has done all that was launched before. So there a call sends its header and goes on, and later calls
look at those that have arrived since: ranks out of step raise a call or two late, when parameters may differ already,
so nothing can go on then.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.transport.backend import all_gather
from zeroadam.transport.calls import MAX_REFUSALS, REFUSED, Calls, Header

LATE = "; noticed late, as NCCL alone has to: with gloo beside it, as in init_process_group() without a backend, "
LATE += "nothing would have changed before"


class Sent(NamedTuple):
    """The headers of one call, on their way."""

    mine: Header
    theirs: Tensor  # int64 [W * 4] on the host
    arrived: Callable[[], bool]
    wait: Callable[[], object]
    kept: tuple[Tensor, ...]  # what the device reads and writes until then


class Headers:
    """See `zeroadam.transport.Channel`.

    Args:
        device: of the tensors that travel.
        waits: whether a call waits for the headers of all ranks.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device, calls: Calls, waits: bool) -> None:
        self.process_group, self.calls, self.device, self.waits = process_group, calls, device, waits
        self.module: Any = torch.get_device_module(device)
        self.stream = self.module.Stream(device) if device.type != "cpu" else None
        self.count = 0  # of headers sent
        self.under_way: deque[Sent] = deque()

    def meet(self) -> None:
        if self.stream is not None and torch.cuda.is_current_stream_capturing():
            return  # as a replay asks nobody
        self._read()
        self._send(self.calls.header(0, self.count))
        if self.waits:
            self._read()

    def refuse(self) -> None:
        if len(self.under_way) >= MAX_REFUSALS:
            self._read()
        self._send(self.calls.last_words(REFUSED, self.count))

    def fail(self) -> None:
        """Nothing: the others are in a collective of rows, which this would be mixed up with."""

    def _send(self, mine: Header) -> None:
        self.count += 1
        sent = torch.tensor(mine, pin_memory=self.stream is not None)
        numel = self.process_group.size() * len(mine)
        theirs = torch.empty(numel, dtype=sent.dtype, pin_memory=self.stream is not None)
        if self.stream is None:
            work = all_gather(theirs, sent, group=self.process_group, async_op=True)
            self.under_way.append(Sent(mine, theirs, work.is_completed, work.wait, (sent,)))
            return
        with self.module.stream(self.stream):
            on_device = sent.to(self.device, non_blocking=True)
            gathered = torch.empty_like(theirs, device=self.device)
            all_gather(gathered, on_device, group=self.process_group, async_op=True).wait()  # on this stream
            theirs.copy_(gathered, non_blocking=True)
            event = self.module.Event()
            event.record(self.stream)
        self.under_way.append(Sent(mine, theirs, event.query, event.synchronize, (sent, on_device, gathered)))

    def _read(self) -> None:
        """Compare what has arrived; all of it where a call waits, or where it must know what the others did."""
        while self.under_way:
            first = self.under_way[0]
            if not (self.waits or first.mine[0] == REFUSED or first.arrived()):
                return
            self.under_way.popleft()
            first.wait()
            headers: list[Header] = [tuple(row) for row in first.theirs.view(-1, len(first.mine)).tolist()]
            theirs = {other: header for other, header in enumerate(headers) if other != self.process_group.rank()}
            try:
                self.calls.check(first.mine, theirs, self.process_group.rank())
                if not self.waits and first.mine[0] == REFUSED and any(header != first.mine for header in headers):
                    raise RuntimeError("the other ranks have gone on in a call that this one has refused")
            except RuntimeError as error:
                if self.waits:
                    raise
                self.calls.broken = self.calls.broken or f"{error}{LATE}"
                raise RuntimeError(f"{error}{LATE}") from None
