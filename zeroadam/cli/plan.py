"""`zeroadam plan`: a table, JSON or a picture of `zeroadam.plan`."""

import argparse
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroadam.memory_plan import RankBytes, plan, whole_tensors
from zeroadam.reduce.hook import bf16_reduce_scatter_hook, reduce_scatter_hook

HOOKS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "reduce_scatter": reduce_scatter_hook,
    "bf16_reduce_scatter": bf16_reduce_scatter_hook,
}
MASTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "float32": {"master_dtype": torch.float32},
    "remainder": {"master_dtype": torch.float32, "store_param_remainders": True},
}
STATE_DTYPES = {"none": None, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
PARTS = ("parameters", "gradients", "moments", "master", "staging")


def add_arguments(command: argparse.ArgumentParser) -> None:
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--params", type=_count, metavar="N", help="only how many, such as 7e9")
    what.add_argument("--model", metavar="MODULE:FACTORY", help="called without arguments, on the meta device")
    what.add_argument("--state-dict", type=Path, metavar="FILE", help=".safetensors, or of torch.save")
    command.add_argument("--world-size", type=_world_sizes, default="1,2,4,8", metavar="W,W,...")
    command.add_argument("--shard-size", type=int, metavar="S", help="hybrid: the ranks over which state is cut")
    command.add_argument("--dtype", choices=DTYPES, help="of the parameters, if not as they are, or else fp32")
    command.add_argument("--master-weights", choices=MASTERS, default="none", help="float32 copies")
    command.add_argument("--state-dtype", choices=STATE_DTYPES, default="none", help="of the moments")
    command.add_argument("--amsgrad", action="store_true")
    command.add_argument("--hook", choices=HOOKS, default="none", help="in place of DDP's all-reduce")
    command.add_argument("--backend", choices=["nccl", "gloo"], default="nccl")
    command.add_argument("--bucket-cap-mb", type=float, default=25.0)
    command.add_argument("--hbm", type=_bytes, metavar="80GB", help="memory of a device: marks what fits")
    command.add_argument("--json", action="store_true", help="every rank's bytes, instead of the table")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it as well")


def run(args: argparse.Namespace) -> None:
    params = load(args)
    state = {
        "amsgrad": args.amsgrad,
        "state_dtype": STATE_DTYPES[args.state_dtype],
        **MASTERS[args.master_weights],
    }
    layout = {"hook": HOOKS[args.hook], "backend": args.backend, "bucket_cap_mb": args.bucket_cap_mb}
    layout["shard_size"] = args.shard_size
    plain = plan(params, 1, **state)[0]
    every = plain.parameters + plain.gradients
    rows = []
    for world_size in args.world_size:
        ranks = plan(params, world_size, **state, **layout)
        others = [every + held for held in whole_tensors(params, world_size, **state)] if args.params is None else None
        rows.append((ranks, every + plain.state, others))
    numel = sum(param.numel() for param in params)
    if args.plot:
        draw(args.plot, rows, args.hbm, f"{numel / 1e6:,.1f} M parameters")
    if args.json:
        keys = ("ranks", "adamw", "zero_redundancy")
        found = [dict(zip(keys, ([asdict(rank) for rank in row[0]], *row[1:]), strict=True)) for row in rows]
        print(json.dumps({"parameters": numel, "world_sizes": dict(zip(args.world_size, found, strict=True))}))
    else:
        show(rows, args.hbm, f"{numel / 1e6:,.1f} M parameters, bytes on the fullest rank", args.hook)


def load(args: argparse.Namespace) -> list[nn.Parameter]:
    """The parameters, on the meta device; raises ValueError for what is none."""
    if args.params is not None:
        found: Iterable[Tensor] = [nn.Parameter(torch.empty(args.params, device="meta"))]
    elif args.model is not None:
        found = build(args.model).parameters()
    else:
        found = [nn.Parameter(tensor) for tensor in read(args.state_dict)]
    params = [
        nn.Parameter(p.to("meta", DTYPES[args.dtype] if args.dtype else p.dtype), requires_grad=p.requires_grad)
        for p in found
    ]
    if not any(param.requires_grad and param.numel() for param in params):
        raise ValueError("there are no parameters to train")
    return params


def build(where: str) -> nn.Module:
    module, _, factory = where.partition(":")
    if not factory:
        raise ValueError(f"--model {where}: give it as package.module:factory")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {where}: {error}") from None
    with torch.device("meta"):
        model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {where} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def read(file: Path) -> list[Tensor]:
    """Floating-point tensors of a saved state dict, tied ones once, without reading their numbers."""
    if file.suffix == ".safetensors":  # length of the header, 8 bytes; the header, JSON; the numbers
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return [
            torch.empty(entry["shape"], dtype=SAFETENSORS[entry["dtype"]], device="meta")
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] in SAFETENSORS
        ]
    loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, not a state dict")
    if isinstance(loaded.get("model"), dict):  # what `zeroadam export` and many training scripts write
        loaded = loaded["model"]
    tensors = [t for t in loaded.values() if isinstance(t, Tensor) and t.is_floating_point()]
    return list({(t.data_ptr(), t.shape): t for t in tensors}.values())


Row = tuple[list[RankBytes], int, list[int] | None]


def show(rows: list[Row], hbm: float | None, title: str, hook: str) -> None:
    from rich.console import Console
    from rich.table import Table

    scale, unit = (1e9, "GB") if max(row[1] for row in rows) >= 1e9 else (1e6, "MB")
    table = Table(title=f"{title}, {unit}", caption="without activations, and what the framework itself needs")

    def size(number: float) -> str:
        fits = "" if hbm is None else " [green]✓[/]" if number <= hbm else " [red]✗[/]"
        return f"{number / scale:,.3f}{fits}"

    for column in ("W", *PARTS, "total", "AdamW", "ZeroRedundancy-\nOptimizer", f"sent per step,\nhook {hook}"):
        table.add_column(column, justify="right", no_wrap=True)
    for ranks, adamw, others in rows:
        fullest = max(ranks, key=lambda rank: rank.total)
        parts = [f"{getattr(fullest, part) / scale:,.3f}" for part in PARTS]
        sent = f"{max(rank.sent for rank in ranks) / scale:,.3f}"
        table.add_row(
            str(len(ranks)), *parts, size(fullest.total), size(adamw), size(max(others)) if others else "", sent
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def draw(file: Path, rows: list[Row], hbm: float | None, title: str) -> None:
    """Stacked bars over W, of the fullest rank, beside AdamW and ZeroRedundancyOptimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(2 + 1.1 * len(rows), 4), layout="constrained")
    places, bottom = range(len(rows)), [0.0] * len(rows)
    fullest = [max(ranks, key=lambda rank: rank.total) for ranks, _, _ in rows]
    for part in PARTS:
        heights = [getattr(rank, part) / 1e9 for rank in fullest]
        if any(heights):
            axis.bar(places, heights, 0.6, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.scatter(places, [adamw / 1e9 for _, adamw, _ in rows], marker="_", s=900, color="black", label="AdamW")
    if all(others for _, _, others in rows):
        most = [max(others or [0]) / 1e9 for _, _, others in rows]
        axis.scatter(places, most, marker="_", s=900, color="gray", label="ZeroRedundancyOptimizer")
    if hbm is not None:
        # A colour that no part has.
        axis.axhline(hbm / 1e9, color="magenta", linestyle="--", linewidth=2, label=f"limit: {hbm / 1e9:g} GB")
    axis.set_xticks(places, [str(len(ranks)) for ranks, _, _ in rows])
    axis.set(xlabel="ranks", ylabel="GB on the fullest rank", title=title)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=120)


def _count(text: str) -> int:
    number = _bytes(text)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text} is not a number of parameters")
    return int(number)


def _bytes(text: str) -> float:
    match = re.fullmatch(r"([\d.]+(?:e\+?\d+)?)\s*([KMGT]?i?)B?", text, re.IGNORECASE)
    if match is None or not math.isfinite(number := float(match[1])) or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give it as 80GB, 80GiB or 7e9")
    return number * UNITS[match[2].upper()]


def _world_sizes(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of ranks: give it as 1,2,4,8")
    return [int(number) for number in text.split(",")]
