"""Whether tensors, and lists of anything, are still what they were."""

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

dtype_of = attrgetter("dtype")


def places_of(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Where tensors lie in memory, and how: addresses, dtypes, strides and shapes."""
    return tuple(list(map(what, tensors)) for what in (Tensor.data_ptr, dtype_of, Tensor.stride, Tensor.size))


def overlapping(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Two tensors that have elements in the same memory, if there are any."""
    spans = sorted(((t.data_ptr(), t) for t in tensors if t.numel()), key=lambda span: span[0])
    open_spans: list[tuple[int, Tensor]] = []  # those that reach beyond the start of the next one
    for start, tensor in spans:
        open_spans = [(at, other) for at, other in open_spans if at + _reach(other) * other.itemsize > start]
        for at, other in open_spans:
            if tensor.device == other.device and _have_common_elements(other, tensor, start - at):
                return other, tensor
        open_spans.append((start, tensor))
    return None


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _have_common_elements(first: Tensor, second: Tensor, distance: int) -> bool:
    """Whether two tensors whose spans of memory overlap, `distance` bytes apart, have elements in common."""
    if first.dtype != second.dtype or distance % first.itemsize:
        return True
    distance //= first.itemsize
    taken = torch.zeros(max(_reach(first), distance + _reach(second)), dtype=torch.bool)
    taken.as_strided(first.shape, first.stride()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), distance).any())


def identical(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects, which may be tensors."""
    return len(these) == len(those) and all(map(is_, these, those))
