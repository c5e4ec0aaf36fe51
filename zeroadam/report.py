"""What a step cost on this rank: bytes, and seconds under names that profilers show as well."""

import time
from collections import defaultdict
from dataclasses import dataclass
from types import TracebackType

from torch.profiler import record_function


@dataclass(frozen=True)
class StepReport:
    """Of one rank, from the end of one step to the end of the next. See `ZeroAdam.report`."""

    sent: int  # bytes to other ranks, through shared memory or a network: of gathers, and of the hook's reductions
    received: int
    update: float  # seconds in Adam
    communication: float  # seconds in sending, waiting for other ranks and unpacking
    imbalance: float  # elements that the fullest rank updates, over the mean
    sums: int = 0  # bytes of gradients' float32 sums on this rank, with `grad_dtype`


class Meter:
    """Adds up what a step costs."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.sent = self.received = 0
        self.last = StepReport(0, 0, 0.0, 0.0, 1.0)

    def phase(self, name: str) -> "Phase":
        return Phase(self, name)

    def count(self, sent: int, received: int) -> None:
        self.sent += sent
        self.received += received

    def end_step(self, imbalance: float, sums: int = 0) -> None:
        update = self.seconds.pop("update", 0.0)
        self.last = StepReport(self.sent, self.received, update, sum(self.seconds.values()), imbalance, sums)
        self.seconds.clear()
        self.sent = self.received = 0


class Phase:
    """A stretch of time on this process's clock, and in the traces of torch.profiler as zeroadam.NAME."""

    def __init__(self, meter: Meter, name: str) -> None:
        self.meter, self.name, self.record = meter, name, record_function(f"zeroadam.{name}")

    def __enter__(self) -> None:
        self.record.__enter__()
        self.start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.meter.seconds[self.name] += time.perf_counter() - self.start
        self.record.__exit__(kind, error, trace)
