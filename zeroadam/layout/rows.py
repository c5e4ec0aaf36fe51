"""What one exchange between the ranks sends: one row for each rank, all in one run of memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class RowRules(NamedTuple):
    """What a transport asks of the rows that it sends."""

    equal: bool  # whether packed rows must be equally long
    direct_bytes: int  # pieces of this size and more travel from and into where they lie; smaller ones are packed
    large_bytes: int = 25 * 2**20  # likewise those of tensors of this size, also in rows that are not equally long


@dataclass(frozen=True)
class Rows:
    """W rows: row r, of rank r, is [numels[r]] and begins `pitch` elements after row r - 1."""

    memory: Tensor  # [n], n >= (W - 1) * pitch + numels[-1] unless the last rows are empty
    pitch: int
    numels: Sequence[int]

    def __getitem__(self, rank: int) -> Tensor:
        return self.memory[rank * self.pitch : rank * self.pitch + self.numels[rank]]

    def __len__(self) -> int:
        return len(self.numels)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[rank] for rank in range(len(self)))

    @property
    def equal(self) -> bool:
        """Whether all rows are equally long and follow each other."""
        return all(numel == self.pitch for numel in self.numels)

    def whole(self) -> Tensor:
        """All rows as one run of memory, where they are equal: [W * n]."""
        assert self.equal
        return self.memory[: self.pitch * len(self)]

    def sent(self) -> Tensor:
        """All rows one behind the other: [n], of the memory itself where there are no gaps."""
        filled = [numel for numel in self.numels if numel]
        if list(self.numels[: len(filled)]) == filled and all(numel == self.pitch for numel in filled[:-1]):
            return self.memory[: sum(filled)]
        return torch.cat(list(self))

    def others(self, rank: int) -> list[Tensor]:
        """The memory before and behind row `rank`, where rows follow each other."""
        return [self.memory[: rank * self.pitch], self.memory[rank * self.pitch + self.numels[rank] :]]
