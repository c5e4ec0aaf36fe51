"""Adam on CUDA in one trip through memory: one Triton kernel for all pieces of a bucket.

It does what `zeroadam.update.adam` does for one block: follow a parameter that was set, join a master and its
remainder, cast and divide the gradient, run Adam, and round what is stored in fewer bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zeroadam.update.piece import Piece
from zeroadam.update.rounding import CODES, GOLDEN, HASH

BLOCK = 2048
# Where a piece begins off 16 bytes, its narrow loads take over twice the registers: see docs/gpus.md.
WARPS, WARPS_OFF_16 = 4, 8
TENSORS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "remainder", "step")  # after the parameter
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Table = tuple[Tensor, Tensor]  # the same on the host and on the device
# Kernels in a CUDA graph go on reading their tables, which are kept as long as the state that the graph changes: the
# count of steps of the first piece -> tables.
_CAPTURED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_TABLES: dict[Any, Table] = {}
MAX_TABLES = 1000


def fits(piece: Piece, group: Mapping[str, Any]) -> bool:
    """Whether the kernel can update this piece: without 8-bit moments, float64, or gaps and other orders in memory."""
    param, state = piece.param, piece.state
    tensors = [piece.grad, *(state[name] for name in TENSORS[:-1] if name in state)]
    return (
        group["fused"]
        and not any(isinstance(beta, Tensor) for beta in group["betas"])
        and "exp_avg" + CODES not in state
        and all(tensor.dtype in DTYPES and tensor.stride() == param.stride() for tensor in (param, *tensors))
        and state["step"].device == param.device
    )


class Launch(NamedTuple):
    """Of the kernel in one step: for pieces of the same dtypes."""

    pieces: list[Piece]
    aligned: bool  # all but gradients lie at multiples of 16 bytes, so that loads may be as wide
    grad_aligned: bool  # gradients as well, which lie where DDP's bucket has them
    scalars: Tensor  # float32 [pieces, 4]


def prepare(
    updates: Sequence[Sequence[Piece]], group: Mapping[str, Any], steps: Sequence[Tensor]
) -> list[list[Launch]]:
    """Count a step, and compute what depends on the counts, once for all of a param group: the launches of each update.

    updates: pieces that fit. steps: [] each, other counts of the group on the device, which are counted as well.
    """
    kinds = [_kinds(pieces) for pieces in updates]
    own = [piece.state["step"] for of_update in kinds for alike in of_update.values() for piece in alike]
    if own or steps:
        torch._foreach_add_([*own, *steps], 1)
    rest = _scalars(own, group) if own else torch.empty(0)
    launches: list[list[Launch]] = []
    for of_update in kinds:
        launches.append([])
        for (aligned, grad_aligned, *_), alike in of_update.items():
            launches[-1].append(Launch(alike, aligned, grad_aligned, rest[: len(alike)]))
            rest = rest[len(alike) :]
    return launches


def _kinds(pieces: Sequence[Piece]) -> dict[Any, list[Piece]]:
    """Those that one launch can update, by whether they are aligned and their dtypes."""
    kinds: dict[Any, list[Piece]] = {}
    for piece in pieces:
        dtypes = tuple(piece.state[name].dtype for name in TENSORS if name in piece.state)
        tensors = [piece.param, *(tensor for name, tensor in piece.state.items() if name != "step")]
        aligned = piece.param.numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        kind = aligned, aligned and piece.grad.data_ptr() % 16 == 0, piece.param.dtype, piece.grad.dtype, piece.compute
        kinds.setdefault((*kind, dtypes), []).append(piece)
    return kinds


def _scalars(steps: list[Tensor], group: Mapping[str, Any]) -> Tensor:
    """What depends on the counts of steps, for each of them: float32 [pieces, 4], rows of 16 bytes."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    # In float64 as in torch: [pieces] each.
    step = torch.stack(steps).double()
    lr = lr.double() if isinstance(lr, Tensor) else lr
    size, root = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
    decay = torch.zeros_like(step) + (1 - lr * group["weight_decay"])
    return torch.stack([size, root, decay, decay], 1).float()


def update(launch: Launch, group: Mapping[str, Any]) -> None:
    """One step of Adam, in place on `param` and `state` of the pieces."""
    first, (beta1, beta2) = launch.pieces[0], group["betas"]
    table, blocks, grads = _tables(launch.pieces)
    _kernel[(blocks.shape[0],)](
        table,
        blocks,
        grads,
        launch.scalars,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        group["eps"],
        group["weight_decay"],
        param_dtype=DTYPES[first.param.dtype],
        grad_dtype=DTYPES[first.grad.dtype],
        moment_dtype=DTYPES[first.state["exp_avg"].dtype],
        compute_dtype=DTYPES[first.compute],
        master="master" in first.state,
        remainder="remainder" in first.state,
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        decoupled=group["decoupled_weight_decay"],
        aligned=launch.aligned,
        grad_aligned=launch.grad_aligned,
        hash_=HASH,
        golden=GOLDEN,
        block=BLOCK,
        num_warps=WARPS if launch.aligned else WARPS_OFF_16,
        enable_fp_fusion=True,  # as in torch's fused kernel
    )


def _tables(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel reads, on the device.

    Where everything is but gradients, int64 [pieces, 9]; which block is whose and where in it, int32 [blocks, 2]; where
    the gradients are, int64 [pieces]: apart, as these may be allocated anew in each step.
    """
    rows: list[int] = []
    for piece in pieces:
        tensors = [piece.param, *(piece.state.get(name) for name in TENSORS)]
        rows += [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        rows += [piece.param.numel(), piece.divisor]
    device = pieces[0].param.device
    tables = (
        _table(tuple(rows), device, _as_rows),
        _table(tuple(piece.param.numel() for piece in pieces), device, _blocks),
        _table(tuple(piece.grad.data_ptr() for piece in pieces), device, _as_rows),
    )
    if _capturing(device):
        _CAPTURED.setdefault(pieces[0].state["step"], []).extend(tables)
    return tables[0][1], tables[1][1], tables[2][1]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _table(numbers: tuple[int, ...], device: torch.device, make: Callable[[tuple[int, ...]], Tensor]) -> Table:
    """A table made of numbers, on the host and on a device, to which it is copied without waiting."""
    key = (device, make, numbers)
    if key not in _TABLES:
        while len(_TABLES) >= MAX_TABLES:
            del _TABLES[next(iter(_TABLES))]
        host = make(numbers)
        host = host.pin_memory() if device.type == "cuda" else host
        _TABLES[key] = host, host.to(device, non_blocking=True)
    return _TABLES[key]


def _as_rows(numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _blocks(numels: tuple[int, ...]) -> Tensor:
    """(piece, block of it) for each program: int32 [blocks, 2]."""
    counts = torch.tensor([-(-numel // BLOCK) for numel in numels])
    piece = torch.arange(len(numels)).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts)[piece]
    return torch.stack([piece, torch.arange(len(piece)) - first], dim=1).int()


@triton.jit
def _at(row, column: tl.constexpr, dtype: tl.constexpr, offsets, aligned: tl.constexpr):
    start = tl.load(row + column).to(tl.pointer_type(dtype))
    if aligned:
        start = tl.multiple_of(start, 16)
    return start + offsets


@triton.jit
def _quiet(value):
    """Every NaN is one to whose bits 2^16 can be added."""
    return tl.where(value != value, float("nan"), value)


@triton.jit
def _round(value, dtype: tl.constexpr):
    """float32 to the nearest of a dtype; in bits for bfloat16, as Triton's interpreter would cut them off."""
    if dtype == tl.bfloat16:
        bits = _quiet(value).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def _round_moment(value, dtype: tl.constexpr, stochastic: tl.constexpr, shift, hash_: tl.constexpr):
    if stochastic:
        bits = _quiet(value).to(tl.int32, bitcast=True)
        noise = (((bits >> 16) * hash_ + shift) >> 16) + 0x8000
        return ((bits + noise) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return _round(value, dtype)


@triton.jit
def _kernel(
    table,
    blocks,
    grads,
    scalars,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    weight_decay,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    moment_dtype: tl.constexpr,
    compute_dtype: tl.constexpr,
    master: tl.constexpr,
    remainder: tl.constexpr,
    amsgrad: tl.constexpr,
    maximize: tl.constexpr,
    decoupled: tl.constexpr,
    aligned: tl.constexpr,
    grad_aligned: tl.constexpr,
    hash_: tl.constexpr,
    golden: tl.constexpr,
    block: tl.constexpr,
):
    """Programs: one for each row of `blocks`. As in torch, arithmetic is float32 whatever the dtypes."""
    index = tl.program_id(0).to(tl.int64)
    piece = tl.load(blocks + 2 * index).to(tl.int64)
    offsets = tl.load(blocks + 2 * index + 1).to(tl.int64) * block + tl.arange(0, block)
    row = table + piece * 9
    numel = tl.load(row + 7)
    if aligned:
        numel = tl.multiple_of(numel, 16)
    mask = offsets < numel
    size, root = tl.load(scalars + piece * 4), tl.load(scalars + piece * 4 + 1)

    param_at = _at(row, 0, param_dtype, offsets, aligned)
    param = tl.load(param_at, mask=mask)
    if remainder:
        remainder_at = _at(row, 5, tl.int16, offsets, aligned)
        low = tl.load(remainder_at, mask=mask).to(tl.int32)
        high = param.to(tl.int16, bitcast=True).to(tl.int32)
        stale = ((high & 0x7FFF) == 0) & (low < 0)  # see `zeroadam.update.master.join`
        weight = ((high << 16) + tl.where(stale, 0, low)).to(tl.float32, bitcast=True)
    elif master:
        master_at = _at(row, 4, tl.float32, offsets, aligned)
        held = tl.load(master_at, mask=mask)
        weight = tl.where(_round(held, param_dtype) == param, held, param.to(tl.float32))
    else:
        weight = param.to(tl.float32)

    grad = tl.load(_at(grads + piece, 0, grad_dtype, offsets, grad_aligned), mask=mask).to(tl.float32)
    grad = _round(tl.div_rn(grad, tl.load(row + 8).to(tl.float32)), compute_dtype).to(tl.float32)
    if maximize:
        grad = -grad
    if decoupled:
        weight *= tl.load(scalars + piece * 4 + 2)
    else:
        grad += weight * weight_decay

    first_at, second_at = _at(row, 1, moment_dtype, offsets, aligned), _at(row, 2, moment_dtype, offsets, aligned)
    first = beta1 * tl.load(first_at, mask=mask).to(tl.float32) + rest1 * grad
    second = beta2 * tl.load(second_at, mask=mask).to(tl.float32) + rest2 * grad * grad
    largest = second
    if amsgrad:
        largest_at = _at(row, 3, moment_dtype, offsets, aligned)
        largest = tl.maximum(tl.load(largest_at, mask=mask).to(tl.float32), second, propagate_nan=tl.PropagateNan.ALL)
    weight -= size * tl.div_rn(first, tl.div_rn(tl.sqrt_rn(largest), root) + eps)

    stochastic: tl.constexpr = moment_dtype == tl.bfloat16 and compute_dtype == tl.float32
    shift = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32))).to(tl.int32) * golden
    tl.store(first_at, _round_moment(first, moment_dtype, stochastic, shift, hash_), mask=mask)
    tl.store(second_at, _round_moment(second, moment_dtype, stochastic, shift, hash_), mask=mask)
    if amsgrad:
        tl.store(largest_at, _round_moment(largest, moment_dtype, stochastic, shift, hash_), mask=mask)

    if remainder:
        bits = _quiet(weight).to(tl.int32, bitcast=True)
        tl.store(remainder_at, bits.to(tl.int16), mask=mask)
        tl.store(param_at, ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        if master:
            tl.store(master_at, weight, mask=mask)
        tl.store(param_at, _round(weight, param_dtype), mask=mask)
