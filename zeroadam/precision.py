"""In how many bits the state is kept, where that is fewer or more than the parameter has.

Moments may be kept in bfloat16, rounded stochastically, or in 8 bits, in blocks that each have a scale (Dettmers et
al., arXiv:2110.02861), with the kernels of bitsandbytes. Adam computes in float32 then. Neither depends on how the
parameter is cut: random bits are made of what is rounded, and a block lies within a row.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroadam.master import quiet
from zeroadam.shard import shard_dim

# A moment in 8 bits is two tensors: the codes, of the parameter's shape, and the largest magnitude of each block.
CODES, SCALES = "_8bit", "_absmax"
BLOCK_NUMELS = (256, 128, 64)  # the first of them that divides a row
# The W for which a parameter with 8-bit moments must be cut into rows, as its blocks lie within these.
WORLD_SIZES = (*range(1, 9), 16, 32, 64)


@dataclass(frozen=True)
class Precision:
    """Of the state of one parameter."""

    compute: torch.dtype  # in which Adam runs
    moments: torch.dtype  # bfloat16 or uint8 where that is not the same
    master: str | None  # under which name it is in the state, if there is one


def precision(
    param: Tensor, master_dtype: torch.dtype | None, store_param_remainders: bool, state_dtype: torch.dtype | None
) -> Precision:
    """What the arguments of `ZeroAdam` mean for a parameter [d0, ...]."""
    compute, master = compute_dtype(param, master_dtype, state_dtype), None
    if master_dtype is not None and param.dtype in (torch.bfloat16, torch.float16):
        master = "remainder" if store_param_remainders and param.dtype == torch.bfloat16 else "master"
    if state_dtype is None or param.itemsize > 4 or (state_dtype == torch.uint8 and block_numel(param) is None):
        return Precision(compute, compute, master)
    return Precision(compute, state_dtype, master)


def compute_dtype(param: Tensor, master_dtype: torch.dtype | None, state_dtype: torch.dtype | None) -> torch.dtype:
    """In which Adam runs: the parameter's own, or float32 if its state is kept otherwise."""
    if param.itemsize > 4 or (master_dtype is None and state_dtype is None):
        return param.dtype
    return torch.float32


def block_numel(param: Tensor) -> int | None:
    """Of the blocks of 8-bit moments: None for a parameter whose rows are not made of blocks, or that is cut otherwise.

    It depends on the parameter alone, not on W, and so do the numbers of a training.
    """
    if param.dim() < 2 or not param.is_contiguous():
        return None
    if any(shard_dim(param.shape, world_size) != 0 for world_size in WORLD_SIZES):
        return None
    row = math.prod(param.shape[1:])
    return next((numel for numel in BLOCK_NUMELS if row and row % numel == 0), None)


def check_blocks(params: Iterable[Tensor], world_size: int) -> None:
    """Raise ValueError if the cut over this many ranks would divide blocks."""
    for param in params:
        if block_numel(param) and shard_dim(param.shape, world_size) != 0:
            raise ValueError(
                f"state_dtype=torch.uint8 on {world_size} ranks would cut the rows of a parameter of shape "
                f"{tuple(param.shape)}, and its blocks with them: train on one of {WORLD_SIZES} ranks"
            )


def stored_names(moment: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Under which names `moment` is in the state."""
    return (moment + CODES, moment + SCALES) if dtype == torch.uint8 else (moment,)


def layout(param: Tensor, name: str, kept: Precision) -> Tensor:
    """A tensor without memory, of the shape [d0, ...], stride order and dtype of the state called `name`."""
    if name.endswith(SCALES) and (block := block_numel(param)):
        return torch.empty(param.shape[0], math.prod(param.shape[1:]) // block, device="meta")
    other = kept.compute if kept.moments == torch.uint8 else kept.moments
    dtype = {"master": torch.float32, "remainder": torch.bfloat16}.get(name, other)
    return torch.empty_like(param, dtype=torch.uint8 if name.endswith(CODES) else dtype, device="meta")


def convert_moment(given: Mapping[str, Tensor], moment: str, param: Tensor, kept: Precision) -> dict[str, Tensor]:
    """A moment as it is kept, [c, ...], from how it was saved; in its own dtype if bits would be lost unasked."""
    names = stored_names(moment, kept.moments)
    if given.keys() == set(names) and (kept.moments == torch.uint8 or given[moment].dtype == kept.moments):
        return dict(given)
    value = given[moment] if moment in given else dequantize(given[moment + CODES], given[moment + SCALES], moment)
    if kept.moments == torch.uint8:
        block = block_numel(param)
        assert block is not None
        return dict(zip(names, quantize(value.float(), moment, block), strict=True))
    fits = value.is_floating_point() and value.itemsize <= 4
    return {moment: value.to(kept.moments) if fits and kept.compute == torch.float32 else value}


def round_stochastically(value: Tensor, into: Tensor, step: Tensor, room: Tensor) -> None:
    """Store float32 [n] as bfloat16: up or down with the probability that keeps the mean.

    The 16 random bits are a multiplicative hash of the number below, shifted from step to step by a golden ratio: over
    the steps they are spread more evenly than chance would spread them, every rank and every W gets the same, and
    another last bit of the number hardly ever matters.

    step: [], counted already. room: for an int32 [n].
    """
    value = quiet(value)
    bits = value.view(torch.int32)
    shift = step.to(torch.int64).mul(GOLDEN).to(torch.int32)
    torch.bitwise_right_shift(bits, 16, out=room).mul_(HASH).add_(shift).bitwise_right_shift_(16).add_(0x8000)
    into.view(torch.int16).copy_(room.add_(bits).bitwise_right_shift_(16))


GOLDEN = 0x9E3779B9 - 2**32
HASH = 0x85EBCA6B - 2**32


def quantize(value: Tensor, moment: str, block: int) -> tuple[Tensor, Tensor]:
    """float32 [c, ...] or [n] to codes, uint8 of that shape, and scales [c, row / block] or [n / block]."""
    shape = value.shape[:1] if value.dim() > 1 else ()
    if value.numel() == 0:
        return torch.empty_like(value, dtype=torch.uint8), value.new_empty(*shape, 0)
    codes, state = bitsandbytes().quantize_blockwise(value, code=_code(moment, value.device), blocksize=block)
    return codes, state.absmax.view(*shape, -1)


def dequantize(codes: Tensor, scales: Tensor, moment: str) -> Tensor:
    """What was quantized, float32 of the shape of `codes`."""
    if codes.numel() == 0:
        return torch.empty_like(codes, dtype=torch.float32)
    value: Tensor = bitsandbytes().dequantize_blockwise(
        codes,
        absmax=scales.reshape(-1),
        code=_code(moment, codes.device),
        blocksize=codes.numel() // scales.numel(),
    )
    return value


def dequantize_entry(entry: dict[str, Any]) -> None:
    """Give the full state of a parameter its moments in 8 bits as torch's Adam has them, in float32 [d0, ...]."""
    for name in [name for name in entry if name.endswith(CODES)]:
        moment = name.removesuffix(CODES)
        entry[moment] = dequantize(entry.pop(name), entry.pop(moment + SCALES), moment)


@functools.cache
def _code(moment: str, device: torch.device) -> Tensor:
    """The 256 numbers from -1 to 1, or from 0 for second moments, that the codes stand for.

    Those of bitsandbytes, but for -1 in place of -0.993: the largest number of a block stays what it is then.
    """
    code: Tensor = bitsandbytes().create_dynamic_map(signed=moment == "exp_avg").to(device)
    if moment == "exp_avg":
        code[0] = -1
    return code


@functools.cache
def bitsandbytes() -> Any:
    """Its functions; raises ValueError if it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ValueError("state_dtype=torch.uint8 needs bitsandbytes: pip install 'zeroadam[8bit]'") from error
    return bitsandbytes.functional
