"""The counts of steps as the host knows them, to compare them between ranks without waiting for a device."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from zeroadam.state.agreement import read_scalars

_version_of = attrgetter("_version")


class StepCounts:
    """Of the tensors `step` [] of some states, in their order."""

    def __init__(self, steps: Sequence[Tensor] = ()) -> None:
        self._steps, self._versions = steps, [-1]
        self._on_host = all(step.is_cpu and step.dim() == 0 for step in steps)
        self._values = torch.empty(0, dtype=torch.float64)

    def packed(self) -> bytes:
        """All of them. On a device they are read only if somebody else has changed one, as its version tells."""
        if self._on_host:
            packed: bytes = torch.stack(list(self._steps)).numpy().tobytes() if self._steps else b""
            return packed
        versions = list(map(_version_of, self._steps))
        if versions != self._versions:
            self._values = torch.tensor(read_scalars(self._steps), dtype=torch.float64)
            self._versions = versions
        return self._values.numpy().tobytes()

    def count(self, indices: Sequence[int]) -> None:
        """A step has been taken with the states at these indices, after `packed`."""
        if self._on_host or not indices:
            return
        # Adam changes all of them as often as the first. Where it did not, `packed` finds that and reads them anew.
        added = self._steps[indices[0]]._version - self._versions[indices[0]]
        if len(indices) == len(self._steps):
            self._values += 1
            self._versions = [version + added for version in self._versions]
        else:
            self._values[indices] += 1
            for index in indices:
                self._versions[index] += added
