"""The gathers of a step: which are under way, which of them the next forward may wait for, and who waits for all."""

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zeroadam.gather.param_bucket import STAGING_SLOTS, Gather, ParamBucket
from zeroadam.report import Meter


class Gathers:
    """Starts and finishes gathers."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.in_forward = WeakTensorKeyDictionary()  # the parameters for which modules wait in their forward
        self.waiting: dict[Tensor, Gather] = {}  # of such parameters
        self._packed: deque[Gather] = deque()  # in the order of their staging memory
        self._started: list[Gather] = []

    def free_staging(self, bucket: ParamBucket) -> None:
        """Finish the gather that uses the staging memory of a bucket."""
        if bucket.packed and len(self._packed) == STAGING_SLOTS:
            with self.meter.phase("all_gather"):
                self._packed.popleft().finish()

    def start(self, bucket: ParamBucket) -> None:
        """Gather what has been updated of a bucket."""
        with self.meter.phase("all_gather"):
            started = bucket.start_gather(self.meter)
        if bucket.packed:
            self._packed.append(started[-1])
        if bucket.in_forward is None:
            bucket.in_forward = [all(map(self.in_forward.__contains__, gather.params)) for gather in started]
        for gather, in_forward in zip(started, bucket.in_forward, strict=True):
            if in_forward and bucket.waits_in_forward:
                self.waiting.update(dict.fromkeys(gather.params, gather))
            else:
                self._started.append(gather)

    def end_step(self) -> None:
        """Finish those for which no forward waits."""
        with self.meter.phase("all_gather"):
            for gather in self._started:
                gather.finish()
        self._started.clear()
        self._packed.clear()

    @torch.no_grad()
    def finish_of(self, params: Iterable[Tensor]) -> None:
        """Finish the gathers of some parameters, on the CPU for all readers, elsewhere for the current stream."""
        for param in params:
            if (gather := self.waiting.get(param)) is not None:
                if param.is_cpu:
                    del self.waiting[param]
                with self.meter.phase("all_gather"):
                    gather.finish()

    def finish(self) -> None:
        """Finish all gathers."""
        self.finish_of(list(self.waiting))
        self.waiting.clear()
