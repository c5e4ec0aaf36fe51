"""Moments in fewer bits than Adam computes with, and back.

bfloat16 moments are rounded stochastically. 8-bit moments are made of blocks that each have a scale (Dettmers et al.,
arXiv:2110.02861), by the kernels of bitsandbytes. Neither depends on how a parameter is sharded: the random bits are
made of the number that is rounded, and a block lies within a row.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from zeroadam.update.master import quiet

# A moment in 8 bits is two tensors: the codes, of the parameter's shape, and the largest magnitude of each block.
CODES, SCALES = "_8bit", "_absmax"


def round_stochastically(value: Tensor, into: Tensor, step: Tensor, scratch: Tensor) -> None:
    """Store float32 [n] as bfloat16: up or down with the probability that keeps the mean.

    The 16 random bits are a multiplicative hash of the number below, shifted from step to step by a golden ratio: over
    the steps they are spread more evenly than chance would spread them, every rank and every W gets the same, and
    another last bit of the number hardly ever matters.

    step: [], counted already. scratch: an int32 [n].
    """
    value = quiet(value)
    bits = value.view(torch.int32)
    shift = step.to(torch.int64).mul(GOLDEN).to(torch.int32)
    torch.bitwise_right_shift(bits, 16, out=scratch).mul_(HASH).add_(shift).bitwise_right_shift_(16).add_(0x8000)
    into.view(torch.int16).copy_(scratch.add_(bits).bitwise_right_shift_(16))


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
        raise ValueError("state_dtype=torch.uint8 needs bitsandbytes: pip install 'bitsandbytes>=0.49'") from error
    return bitsandbytes.functional
