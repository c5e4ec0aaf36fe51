"""Whether tensors, and lists of anything, are still what they were."""

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

dtype_of = attrgetter("dtype")


def places_of(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Where tensors lie in memory, and how: addresses, dtypes, strides and shapes."""
    return tuple(list(map(what, tensors)) for what in (Tensor.data_ptr, dtype_of, Tensor.stride, Tensor.size))


def identical(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects, which may be tensors."""
    return len(these) == len(those) and all(map(is_, these, those))
