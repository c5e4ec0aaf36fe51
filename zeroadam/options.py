"""The arguments of ZeroAdam that torch's Adam does not have, checked once, and what they mean for a parameter."""

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from zeroadam.layout.shard import shard_dim
from zeroadam.transport.calls import CHECK_CALLS
from zeroadam.update.adam import TRITON
from zeroadam.update.rounding import bitsandbytes

BLOCK_NUMELS = (256, 128, 64)  # of 8-bit moments: the first that divides a row
# The W for which a parameter with 8-bit moments must be sharded along dimension 0, as its blocks lie within rows.
WORLD_SIZES = (*range(1, 9), 16, 32, 64)


@dataclass(frozen=True)
class Precision:
    """In which dtypes the state of one parameter is stored."""

    compute: torch.dtype  # the dtype in which Adam runs
    moments: torch.dtype  # `compute`, or bfloat16, or uint8
    master: str | None  # the name of the master in the state, if there is one


@dataclass(frozen=True)
class Options:
    """See `ZeroAdam`."""

    bucket_cap_mb: float = 25
    master_dtype: torch.dtype | None = None
    store_param_remainders: bool = False
    state_dtype: torch.dtype | None = None
    ordered_sums: bool = False
    grad_dtype: torch.dtype | None = None

    def check(self) -> None:
        """Raise ValueError for values that are not supported."""
        number = isinstance(self.bucket_cap_mb, (int, float))
        if not number or not self.bucket_cap_mb > 0:  # neither is nan
            raise ValueError(f"bucket_cap_mb is a positive number of megabytes, not {self.bucket_cap_mb!r}")
        if self.master_dtype not in (None, torch.float32):
            raise ValueError(f"master_dtype is torch.float32 or None, not {self.master_dtype}")
        if self.store_param_remainders and self.master_dtype is None:
            raise ValueError("store_param_remainders=True needs master_dtype=torch.float32")
        if self.state_dtype not in (None, torch.bfloat16, torch.uint8):
            raise ValueError(f"state_dtype is torch.bfloat16, torch.uint8 or None, not {self.state_dtype}")
        if self.grad_dtype not in (None, torch.float32):
            raise ValueError(f"grad_dtype is torch.float32 or None, not {self.grad_dtype}")

    def check_installed(self) -> None:
        """Raise ValueError where what a precision needs is missing."""
        if self.state_dtype == torch.uint8:
            bitsandbytes()

    def check_blocks(self, params: Iterable[Tensor], world_size: int) -> None:
        """Raise ValueError if sharding over `world_size` ranks would divide blocks of 8-bit moments."""
        for param in params if self.state_dtype == torch.uint8 else ():
            if block_numel(param) and shard_dim(param.shape, world_size) != 0:
                raise ValueError(
                    f"state_dtype=torch.uint8 on {world_size} ranks would cut the rows of a parameter of shape "
                    f"{tuple(param.shape)}, and its blocks with them: train on one of {WORLD_SIZES} ranks"
                )

    def describe(self) -> dict[str, str]:
        """What must be the same on every rank."""
        return {
            **{name: str(value) for name, value in asdict(self).items()},
            CHECK_CALLS: os.environ.get(CHECK_CALLS, "1"),
            TRITON: os.environ.get(TRITON, "0"),
        }

    def precision(self, param: Tensor) -> Precision:
        """The dtypes for the state of a parameter [d0, ...]."""
        compute, master = param.dtype, None
        if param.itemsize <= 4 and not (self.master_dtype is None and self.state_dtype is None):
            compute = torch.float32
        if self.master_dtype is not None and param.dtype in (torch.bfloat16, torch.float16):
            master = "remainder" if self.store_param_remainders and param.dtype == torch.bfloat16 else "master"
        wide = self.state_dtype is None or param.itemsize > 4
        if wide or (self.state_dtype == torch.uint8 and block_numel(param) is None):
            return Precision(compute, compute, master)
        assert self.state_dtype is not None
        return Precision(compute, self.state_dtype, master)


def block_numel(param: Tensor) -> int | None:
    """The elements of a block of 8-bit moments; None for a parameter whose rows are not made of whole blocks.

    It depends on the parameter alone, not on W, and so do the numbers of a training. None as well for a parameter that
    is not always sharded along dimension 0.
    """
    if param.dim() < 2 or not param.is_contiguous():
        return None
    if any(shard_dim(param.shape, world_size) != 0 for world_size in WORLD_SIZES):
        return None
    row = math.prod(param.shape[1:])
    return next((numel for numel in BLOCK_NUMELS if row and row % numel == 0), None)
