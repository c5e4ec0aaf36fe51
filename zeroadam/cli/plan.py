"""`zeroadam plan`: a table, JSON or a picture of `zeroadam.plan`."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from zeroadam.cli.plan_arguments import DTYPES, HOOKS, STATE_DTYPES
from zeroadam.cli.quantities import in_words
from zeroadam.memory_plan import RankBytes, plan, whole_tensors
from zeroadam.reduce import hook as hooks
from zeroadam.untrusted import one_kind_of_error

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PARTS = ("parameters", "gradients", "moments", "master", "staging")
LEFT_OUT = "without activations, and what torch itself needs"


def run(args: argparse.Namespace) -> None:
    params = load(args)
    if args.master_weights:
        args.master_dtype = "none" if args.master_weights == "none" else "float32"
        args.store_param_remainders = args.master_weights == "remainder"
    state_dtype, hook = STATE_DTYPES[args.state_dtype], HOOKS[args.hook]
    state = {
        "amsgrad": args.amsgrad,
        "state_dtype": state_dtype and getattr(torch, state_dtype),
        "master_dtype": torch.float32 if args.master_dtype == "float32" else None,
        "store_param_remainders": args.store_param_remainders,
    }
    check_masters(args, params)
    layout = {
        "hook": hook and getattr(hooks, hook),
        "backend": args.backend,
        "bucket_cap_mb": args.bucket_cap_mb,
        "shard_size": args.shard_size,
    }
    plain = plan(params, 1, **state)[0]
    every = plain.parameters + plain.gradients
    rows = []
    for world_size in args.world_size:
        ranks = plan(params, world_size, **state, **layout)
        others = [every + held for held in whole_tensors(params, world_size, **state)] if args.params is None else None
        rows.append((ranks, every + plain.state, others))
    numel = sum(param.numel() for param in params)
    if args.plot:
        draw(args.plot, rows, args.hbm, f"{in_words(numel)} parameters, without activations")
    if args.json:
        keys = ("ranks", "adamw", "zero_redundancy")
        found = [dict(zip(keys, ([asdict(rank) for rank in row[0]], *row[1:]), strict=True)) for row in rows]
        sizes = dict(zip(args.world_size, found, strict=True))
        print(json.dumps({"parameters": numel, "left_out": "activations", "world_sizes": sizes}))
    else:
        show(rows, args.hbm, f"{in_words(numel)} parameters, bytes on the fullest rank", args.hook)


def check_masters(args: argparse.Namespace, params: list[nn.Parameter]) -> None:
    """Raise ValueError where copies are asked for and no parameter would have one."""
    needs = {torch.bfloat16} if args.store_param_remainders else {torch.bfloat16, torch.float16}
    if args.master_dtype == "float32" and not needs & {param.dtype for param in params if param.requires_grad}:
        found = ", ".join(sorted({str(param.dtype).removeprefix("torch.") for param in params}))
        what = "remainders are stored of bfloat16" if args.store_param_remainders else "copies are made of 16-bit"
        raise ValueError(f"{what} parameters only, and these are {found}: give --dtype bf16, or leave it out")


def load(args: argparse.Namespace) -> list[nn.Parameter]:
    """The parameters, on the meta device; raises ValueError for what is none."""
    if args.params is not None:
        found: Iterable[Tensor] = [nn.Parameter(torch.empty(args.params, device="meta"))]
    elif args.model is not None:
        found = build(args.model).parameters()
    else:
        found = [nn.Parameter(tensor) for tensor in read(args.state_dict)]
    dtype = args.dtype and getattr(torch, DTYPES[args.dtype])
    params = [nn.Parameter(p.to("meta", dtype or p.dtype), requires_grad=p.requires_grad) for p in found]
    if not any(param.requires_grad and param.numel() for param in params):
        raise ValueError("there are no parameters to train")
    return params


def build(where: str) -> nn.Module:
    module, _, factory = where.partition(":")
    if not module or not factory:
        raise ValueError(f"--model {where}: give it as package.module:factory")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), factory)
        with torch.device("meta"):
            model = make()
    except Exception as error:  # whatever a user's module may raise
        raise ValueError(f"--model {where}, imported and called without arguments: {one_line(error)}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {where} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def read(file: Path) -> list[Tensor]:
    """Floating-point tensors of a saved state dict, tied ones once, without reading their numbers."""
    with file.open("rb") as opened:  # what is not there is said in its own words
        start = opened.read(8)
    with one_kind_of_error(file):
        return read_safetensors(file, start) if file.suffix == ".safetensors" else read_saved(file)


def read_safetensors(file: Path, start: bytes) -> list[Tensor]:
    """From its header: length of what follows, 8 bytes; JSON; the numbers."""
    length = int.from_bytes(start, "little")
    if length > file.stat().st_size:
        raise ValueError(f"{file} is no .safetensors file, or a part of one")
    with file.open("rb") as opened:
        header = json.loads(opened.read(8 + length)[8:])
    return [
        torch.empty(entry["shape"], dtype=SAFETENSORS[entry["dtype"]], device="meta")
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in SAFETENSORS
    ]


def read_saved(file: Path) -> list[Tensor]:
    loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, not a state dict")
    if isinstance(loaded.get("model"), dict):  # what `zeroadam export` and many training scripts write
        loaded = loaded["model"]
    tensors = [t for t in loaded.values() if isinstance(t, Tensor) and t.is_floating_point()]
    return list({(t.data_ptr(), t.shape): t for t in tensors}.values())


Row = tuple[list[RankBytes], int, list[int] | None]


def show(rows: list[Row], hbm: float | None, title: str, hook: str) -> None:
    """Print a table, by rich where it is installed."""
    scale, unit = (1e9, "GB") if max(row[1] for row in rows) >= 1e9 else (1e6, "MB")

    def size(number: float) -> str:
        fits = "" if hbm is None else " ✓" if number <= hbm else " ✗"
        return f"{number / scale:,.3f}{fits}"

    header = ["W", *PARTS, "total", "AdamW", "ZeroRedundancy-\nOptimizer", f"sent per step,\nhook {hook}"]
    lines = []
    for ranks, adamw, others in rows:
        fullest = max(ranks, key=lambda rank: rank.total)
        parts = [f"{getattr(fullest, part) / scale:,.3f}" for part in PARTS]
        sent = f"{max(rank.sent for rank in ranks) / scale:,.3f}"
        last = [size(fullest.total), size(adamw), size(max(others)) if others else "", sent]
        lines.append([str(len(ranks)), *parts, *last])
    title = f"{title}, {unit}"
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        show_plain([header, *lines], title)
        return
    table = Table(title=title, caption=LEFT_OUT)
    for column in header:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(cell.replace("✓", "[green]✓[/]").replace("✗", "[red]✗[/]") for cell in line))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def show_plain(rows: list[list[str]], title: str) -> None:
    """Columns of equal width, and headings of two lines as such."""
    upper = [cell.partition("\n")[0] if "\n" in cell else "" for cell in rows[0]]
    lines = [upper, [cell.rpartition("\n")[2] for cell in rows[0]], *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(LEFT_OUT)


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
