"""The counts of steps as the host knows them, to compare them between ranks without reading the tensors every time."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_version_of = attrgetter("_version")


class StepCounts:
    """Of the tensors `step` [] of some states, in their order."""

    def __init__(self, steps: Sequence[Tensor] = ()) -> None:
        self._steps, self._versions = steps, [-1]
        self._values = torch.empty(0, dtype=torch.float64)

    def packed(self) -> bytes:
        """All of them. They are read anew if somebody else has changed one."""
        versions = list(map(_version_of, self._steps))
        if versions != self._versions:
            self._values = torch.tensor([float(step) for step in self._steps], dtype=torch.float64)
            self._versions = versions
        return self._values.numpy().tobytes()

    def count(self, indices: Sequence[int]) -> None:
        """A step has been taken with the states at these indices."""
        if len(indices) == len(self._steps):
            self._values += 1
        else:
            self._values[indices] += 1
        self._versions = list(map(_version_of, self._steps))
