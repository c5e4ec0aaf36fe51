"""The update of this rank's pieces by torch's Adam; on the CPU in blocks, so that what is made on the way stays there.

For each block the gradient is cast and divided, Adam runs, and what is kept in fewer bits is rounded, before the next
block is touched: all of it in one trip through memory, and in the same few megabytes of cache for what lies between.
On CUDA a kernel of our own does the same, in place of torch's fused one; without Triton torch's does, after the casts.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from zeroadam.bucket import flat
from zeroadam.master import MASTERS, follow, join, split
from zeroadam.precision import CODES, SCALES, dequantize, quantize, round_stochastically
from zeroadam.state import moments

if torch.cuda.is_available() and importlib.util.find_spec("triton"):
    from zeroadam import triton_update
else:
    triton_update = None  # type: ignore[assignment]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
STATE = {"step", *(moment + suffix for moment in MOMENTS for suffix in ("", CODES, SCALES)), *MASTERS}
# Elements that are updated at a time on the CPU: their gradient, cast or divided, stays in cache. On other devices,
# where a kernel's launch takes longer than its block, all pieces of a bucket are.
BLOCK_NUMEL = 2**19
# Elements up to which it is cheaper to make a new tensor, of many in one call, than to find room for it.
SMALL_NUMEL = 2**14


@dataclass
class Piece:
    """What this rank updates of one parameter, all [c, ...]; or a run of it, all [n]."""

    param: Tensor  # the parameter itself or what will be gathered of it
    grad: Tensor
    divisor: int  # of the gradient
    state: dict[str, Tensor]  # `step` []; scales [c, row / block] or [n / block]
    compute: torch.dtype  # in which Adam runs


class Room:
    """Memory for what lies between, the same for every block."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, what: str, like: Tensor, dtype: torch.dtype, offset: int) -> Tensor:
        """A tensor with the shape and strides of `like`, `offset` elements behind the start of the block."""
        if like.device.type != "cpu" or offset + like.numel() > 2 * BLOCK_NUMEL:
            return torch.empty_like(like, dtype=dtype)
        if (what, dtype) not in self.buffers:
            self.buffers[what, dtype] = torch.empty(2 * BLOCK_NUMEL, dtype=dtype)
        return self.buffers[what, dtype][offset:].as_strided(like.shape, like.stride())


def update(pieces: Sequence[Piece], group: dict[str, Any]) -> None:
    """One step of Adam on every piece, in place on `param` and `state`; `grad` stays as it is."""
    if triton_update is not None and pieces and pieces[0].param.is_cuda:
        fits = [triton_update.fits(piece, group) for piece in pieces]
        triton_update.update([piece for piece, fit in zip(pieces, fits, strict=True) if fit], group)
        pieces = [piece for piece, fit in zip(pieces, fits, strict=True) if not fit]
    room = Room()
    block: list[Piece] = []
    numel = 0
    for run in _runs(pieces):
        block.append(run)
        numel += run.param.numel()
        if numel >= BLOCK_NUMEL and run.param.device.type == "cpu":
            _update_block(block, group, room)
            block, numel = [], 0
    if block:
        _update_block(block, group, room)


def _runs(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Cut pieces into runs of memory of at most a block each."""
    for piece in pieces:
        numel = piece.param.numel()
        if piece.param.device.type != "cpu" or numel <= BLOCK_NUMEL:
            yield piece
            continue
        tensors = {key: value for key, value in piece.state.items() if key != "step"}
        strides = {t.stride() for name, t in tensors.items() if not name.endswith(SCALES)}
        if strides | {piece.grad.stride()} != {piece.param.stride()}:
            yield piece
            continue
        before = piece.state["step"].clone()
        flat_piece = replace(piece, param=flat(piece.param), grad=flat(piece.grad))
        flat_state = {key: flat(tensor) for key, tensor in tensors.items()}
        for start in range(0, numel, BLOCK_NUMEL):
            part = slice(start, start + BLOCK_NUMEL)
            state = {}
            for key, tensor in flat_state.items():
                per_element = numel // tensor.numel()
                state[key] = tensor[start // per_element : (start + BLOCK_NUMEL) // per_element]
            step = before.clone() if start else piece.state["step"]  # Adam counts at every run
            yield replace(
                flat_piece, param=flat_piece.param[part], grad=flat_piece.grad[part], state={**state, "step": step}
            )


def _update_block(block: Sequence[Piece], group: dict[str, Any], room: Room) -> None:
    names, weights, offsets, numel = moments(group), [], [], 0
    state: dict[str, list[Tensor]] = {"step": [], **{moment: [] for moment in MOMENTS}}
    for piece in block:
        weight = _weight(piece, room, numel)
        weights.append(weight)
        offsets.append(numel)
        state["step"].append(piece.state["step"])
        for moment in names:
            state[moment].append(_moment(piece, moment, weight, room, numel))
        numel += weight.numel()
    grads = _means(block, weights, offsets, room)
    beta1, beta2 = group["betas"]
    adam(
        weights,
        grads,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["max_exp_avg_sq"],
        state["step"],
        foreach=group["foreach"],
        capturable=group["capturable"],
        fused=group["fused"],
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )
    for index, (piece, weight) in enumerate(zip(block, weights, strict=True)):
        for moment in names:
            _keep_moment(piece, moment, state[moment][index], room)
        if "remainder" in piece.state:
            split(weight, piece.param, piece.state["remainder"], room.take("grad", weight, torch.int32, 0))
        elif weight is not piece.param:
            piece.param.copy_(weight)


def _means(block: Sequence[Piece], weights: Sequence[Tensor], offsets: Sequence[int], room: Room) -> list[Tensor]:
    """Gradients over their divisors, in the dtype and the strides of the weights, which fused kernels do not look at.

    The sums themselves stay, as another backward may add to them.
    """
    grads, small = [piece.grad for piece in block], []
    for index, (piece, weight) in enumerate(zip(block, weights, strict=True)):
        grad = piece.grad
        fits = grad.dtype == weight.dtype and grad.stride() == weight.stride()
        if fits and piece.divisor == 1:
            continue
        power_of_two = piece.divisor & (piece.divisor - 1) == 0  # then a product is the same to the bit, and faster
        if fits and power_of_two and weight.numel() <= SMALL_NUMEL:
            small.append(index)
            continue
        own = room.take("grad", weight, weight.dtype, offsets[index])
        if piece.divisor == 1 or grad.dtype != own.dtype:
            grad = own.copy_(grad)
        if not power_of_two:
            grad = torch.div(grad, piece.divisor, out=own)
        elif piece.divisor > 1:
            grad = torch.mul(grad, 1 / piece.divisor, out=own)
        grads[index] = grad
    if small:  # all of the same divisor, as only that of 0-d parameters is another: 1
        means = torch._foreach_mul([grads[index] for index in small], 1 / block[small[0]].divisor)
        for index, mean in zip(small, means, strict=True):
            grads[index] = mean
    return grads


def _weight(piece: Piece, room: Room, offset: int) -> Tensor:
    """What Adam is to change: the parameter itself, its master, or a copy of either in the dtype in which it runs."""
    param, state = piece.param, piece.state
    if "master" in state:
        return follow(state["master"], param, room.take("rounded", param, param.dtype, 0))
    if "remainder" in state:
        return join(param, state["remainder"], room.take("weight", param, torch.int32, offset))
    if param.dtype == piece.compute:
        return param
    return room.take("weight", param, piece.compute, offset).copy_(param)


def _moment(piece: Piece, moment: str, like: Tensor, room: Room, offset: int) -> Tensor:
    kept = piece.state.get(moment)
    if kept is not None and kept.dtype == piece.compute:
        return kept
    if kept is None:
        return dequantize(piece.state[moment + CODES], piece.state[moment + SCALES], moment)
    return room.take(moment, like, piece.compute, offset).copy_(kept)


def _keep_moment(piece: Piece, moment: str, value: Tensor, room: Room) -> None:
    kept = piece.state.get(moment)
    if kept is None:
        codes, scales = piece.state[moment + CODES], piece.state[moment + SCALES]
        new_codes, new_scales = quantize(value, moment, codes.numel() // scales.numel())
        codes.copy_(new_codes)
        scales.copy_(new_scales)
    elif kept is not value:
        round_stochastically(value, kept, piece.state["step"], room.take("grad", value, torch.int32, 0))
