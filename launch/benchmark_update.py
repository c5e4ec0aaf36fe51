"""How fast the update alone is, in bytes per second over those of a plain copy. See `launch/benchmark.py --kernel`."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import now
from torch import nn

from zeroadam.options import Options
from zeroadam.state.storage import moments
from zeroadam.update.adam import Update, scratch_numel
from zeroadam.update.block import Scratch
from zeroadam.update.piece import Piece
from zeroadam.update.rounding import bitsandbytes

ROW = 1024
WARMUP = 2
# dtype of the parameters and gradients, and what ZeroAdamW is told
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16 + master": (torch.bfloat16, {"master_dtype": torch.float32}),
    "bfloat16 + remainder": (torch.bfloat16, {"master_dtype": torch.float32, "store_param_remainders": True}),
    "float32, bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "float32, 8-bit state": (torch.float32, {"state_dtype": torch.uint8}),
}
GROUP = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}


def pieces(kind: str, numel: int, device: torch.device) -> list[Piece]:
    """A shard of `numel` parameters whose gradients are the sum over two ranks."""
    dtype, options = KINDS[kind]
    made = []
    for rows in [numel // ROW // 16] * 16:
        param = torch.randn(rows, ROW, device=device).to(dtype)
        precision = Options(**options).precision(torch.empty(4096, ROW, dtype=dtype, device="meta"))
        state = {"step": torch.zeros((), device=device)}
        for moment in moments(amsgrad=False):
            if precision.moments == torch.uint8:
                state[f"{moment}_8bit"] = torch.zeros_like(param, dtype=torch.uint8)
                state[f"{moment}_absmax"] = torch.zeros(rows, ROW // 256, device=device)
            else:
                state[moment] = torch.zeros_like(param, dtype=precision.moments)
        if precision.master:
            state[precision.master] = torch.zeros_like(param) if precision.master == "remainder" else param.float()
        made.append(Piece(param, torch.randn_like(param), 2, state, precision.compute))
    return made


def moved_bytes(shard: list[Piece]) -> int:
    """The gradient is read, all else read and written."""
    kept = sum(tensor.nbytes for piece in shard for tensor in piece.state.values())
    return sum(2 * piece.param.nbytes + piece.grad.nbytes for piece in shard) + 2 * kept


def ours(kind: str, numel: int, device: torch.device) -> tuple[int, Callable[[], Any]]:
    shard = pieces(kind, numel, device)
    update = Update(shard, GROUP, Scratch(scratch_numel([numel], device), device))
    return moved_bytes(shard), lambda: update.step(GROUP)


def theirs(dtype: torch.dtype, numel: int, device: torch.device) -> tuple[int, Callable[[], Any]]:
    """torch's fused AdamW on the mean; for bfloat16 on a float32 copy, with casts before and after it."""
    shard = pieces("float32" if dtype == torch.float32 else "bfloat16 + master", numel, device)
    masters = [nn.Parameter(piece.state.get("master", piece.param)) for piece in shard]
    adamw = torch.optim.AdamW(masters, weight_decay=0.1, fused=True)

    def step() -> None:
        for master, piece in zip(masters, shard, strict=True):
            master.grad = piece.grad.float().div_(2) if dtype != torch.float32 else piece.grad / 2
        adamw.step()
        if dtype != torch.float32:
            torch._foreach_copy_([piece.param for piece in shard], [master.detach() for master in masters])

    return moved_bytes(shard), step


def copy(numel: int, device: torch.device) -> tuple[int, Callable[[], Any]]:
    source = torch.randn(4 * numel, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes, lambda: target.copy_(source)


def measure(numel: int, rounds: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each way. What is measured is built, and freed again, beside the copy that it is compared with."""
    ways: dict[str, Callable[[], tuple[int, Callable[[], Any]]]] = {
        "torch fused AdamW, float32": lambda: theirs(torch.float32, numel, device),
        "torch fused AdamW, bfloat16 and casts": lambda: theirs(torch.bfloat16, numel, device),
    }
    for kind in KINDS:
        ways[f"zeroadam, {kind}"] = functools.partial(ours, kind, numel, device)
    copied, copy_step = copy(numel, device)
    for name, build in ways.items():
        if "8-bit" in name:
            try:
                bitsandbytes()
            except ValueError:
                continue
        nbytes, step = build()
        seconds: dict[str, list[float]] = {"copy": [], "step": []}
        for _ in range(WARMUP + rounds):
            for what, action in (("copy", copy_step), ("step", step)):
                start = now(device)
                action()
                seconds[what].append(now(device) - start)
        speed = [nbytes / s / 1e9 for s in seconds["step"][WARMUP:]]
        ratios = sorted(mine / (copied / s / 1e9) for mine, s in zip(speed, seconds["copy"][WARMUP:], strict=True))
        yield {
            "update": name,
            "bytes per parameter": nbytes / numel,
            "ms": 1000 * statistics.median(seconds["step"][WARMUP:]),
            "GB/s": statistics.median(speed),
            "of a copy's": statistics.median(ratios),
            "p10": ratios[len(ratios) // 10],
            "p90": ratios[len(ratios) * 9 // 10],
        }
