"""Rows of given lengths and contents for a transport."""

from collections.abc import Iterable

import torch
from torch import Tensor

from zeroadam.layout.rows import Rows


def rows_of(given: Iterable[Tensor]) -> Rows:
    """Rows of any length, in memory of their own."""
    rows = list(given)
    pitch = max(row.numel() for row in rows)
    memory = torch.zeros(len(rows), pitch, dtype=rows[0].dtype)
    for place, row in zip(memory, rows, strict=True):
        place[: row.numel()] = row
    return Rows(memory.view(-1), pitch, [row.numel() for row in rows])
