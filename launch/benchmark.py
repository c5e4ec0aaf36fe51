"""Time training steps of several optimizers side by side: in one process group, on the same model, data and seed.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 launch/benchmark.py --plot bars.png
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 launch/benchmark.py --checkpoint /dev/shm/checkpoints
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=1 launch/benchmark.py --kernel
    OMP_NUM_THREADS=1 python launch/benchmark.py --sweep --plot growth.png
    OMP_NUM_THREADS=1 python launch/benchmark.py --host 300 2000
    OMP_NUM_THREADS=1 python launch/benchmark.py --launches gpt2-124m llama-3-8b --world-size 8 64

The implementations take turns, step by step, so that whatever else the machine is doing meets all of them alike. Each
step of each is compared with the step of DDP + fused AdamW, or of --reference, in the same round. How much memory each
needs is found before, one after the other, in processes of their own.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import benchmark_launches
import torch
import torch.distributed as dist
from benchmark_sweep import numel_of, sweep
from implementations import LIMITS, REFERENCE, Implementation, Limit, installed
from measure import memory, start_peak
from shapes import MODELS


def measured(implementation: Implementation | Limit, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Of every measured step, the most that any rank took."""
    rows = [list(step.values()) for step in implementation.steps[warmup:]]
    table = torch.tensor(rows, device=device, dtype=torch.float64).T.contiguous()
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return dict(zip(implementation.steps[0], table.tolist(), strict=True))


def results(
    implementations: list[Implementation | Limit], peaks: dict[str, int], args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    reference = measured(implementations[0], args.warmup, device)
    expected = implementations[0].parameters() if isinstance(implementations[0], Implementation) else []
    numel = numel_of(args.width, args.layers, args.context)
    rows = []
    for implementation in implementations:
        found = measured(implementation, args.warmup, device)
        ratios = sorted(mine / its for mine, its in zip(found["wall"], reference["wall"], strict=True))
        cpu = [mine / its for mine, its in zip(found["CPU"], reference["CPU"], strict=True)]
        if isinstance(implementation, Implementation):
            pairs = zip(implementation.parameters(), expected, strict=True)
            own: dict[str, Any] = {
                "forward + backward, ms": 1000 * statistics.median(found["forward and backward"]),
                "step, ms": 1000 * statistics.median(found["step"]),
                "state, MB": implementation.state_bytes() / 1e6,
                "peak, MB": peaks[implementation.name] / 1e6 if peaks else "",
                "bitwise": all(torch.equal(mine, its) for mine, its in pairs),
            }
        else:
            own = dict.fromkeys(("forward + backward, ms", "step, ms", "state, MB", "peak, MB", "bitwise"), "")
        rows.append(
            {
                "implementation": implementation.name,
                "ratio": statistics.median(ratios),
                "p10": ratios[len(ratios) // 10],
                "p90": ratios[len(ratios) * 9 // 10],
                "CPU ratio": statistics.median(cpu),
                "ms": 1000 * statistics.median(found["wall"]),
                "CPU, ms": 1000 * statistics.median(found["CPU"]),
                "sent, bytes/param": statistics.median(found["sent"]) / local_ranks() / numel,
                "shared, bytes/param": statistics.median(found["shared"]) / numel,
                **own,
            }
        )
    return rows


def local_ranks() -> int:
    """That share this one's network interfaces."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def alone(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train with nothing else in the process: medians of the slowest rank, and the most that a rank needs."""
    for module in ("torch._dynamo", "torch.distributed.tensor"):  # which torch imports when optimizers are built
        importlib.import_module(module)
    before = start_peak()
    implementation = Implementation(name, args, device)
    for tokens in batches(args, device):
        implementation.step(tokens)
    peak = torch.tensor(memory("VmHWM") - before, dtype=torch.float64)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    found = measured(implementation, args.warmup, device) if args.steps else {}
    medians = {what: statistics.median(numbers) for what, numbers in found.items()}
    numel = numel_of(args.width, args.layers, args.context)
    return {"parameters": numel, "ranks": dist.get_world_size(), "peak": int(peak), **medians}


def peaks_of(names: list[str], args: argparse.Namespace) -> dict[str, int]:
    """Bytes that each needs over what its process had before, on the rank that needs most."""
    found = {}
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    for count, name in enumerate(names):
        command = [sys.executable, __file__, "--alone", name, "--steps", "0", "--warmup", str(args.warmup)]
        command += ["--store", f"{folders[0]}/{count}"]
        for size in ("width", "layers", "context", "batch_size"):
            command += [f"--{size.replace('_', '-')}", str(getattr(args, size))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
        found[name] = json.loads(done.stdout.splitlines()[-1])["peak"] if dist.get_rank() == 0 else 0
    shutil.rmtree(folders[0], ignore_errors=True)
    return found


def batches(args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    generator, shape = torch.Generator().manual_seed(dist.get_rank()), (args.batch_size, args.context + 1)
    return [torch.randint(256, shape, generator=generator).to(device) for _ in range(args.warmup + args.steps)]


def main() -> None:
    names = [*installed(), *LIMITS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="measured, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per rank")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"besides the reference: {'; '.join(names)}",
    )
    parser.add_argument(
        "--reference", choices=installed(), default=REFERENCE, metavar="NAME", help="ratios are to this"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="time saving and loading instead, in this folder"
    )
    parser.add_argument("--no-peaks", action="store_true", help="leave out memory: processes that each import torch")
    parser.add_argument("--kernel", action="store_true", help="time the update alone instead, beside a copy")
    parser.add_argument("--params", nargs="+", type=float, default=[20], help="with --kernel: millions of a shard")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--sweep", action="store_true", help="without torchrun: sizes and numbers of ranks, for growth")
    parser.add_argument(
        "--host", nargs="+", type=int, metavar="N", help="without torchrun: host time for N tiny parameters"
    )
    parser.add_argument(
        "--launches",
        nargs="+",
        choices=MODELS,
        metavar="MODEL",
        help=f"without torchrun or GPU: count: {', '.join(MODELS)}",
    )
    parser.add_argument(
        "--world-size", nargs="+", type=benchmark_launches.several, default=[8, 64, 512], help="with --launches"
    )
    benchmark_launches.add_arguments(parser)
    parser.add_argument("--alone", choices=installed(), metavar="NAME", help="train with one implementation alone")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="FILE", help="in --plot: runs that --json has written"
    )
    args = parser.parse_args()
    if args.no_peaks and args.plot:
        parser.error("--plot draws memory as well: leave out --no-peaks")
    if args.sweep:
        sweep(args)
        return
    if args.host:
        from benchmark_host import table

        rows = list(table(args.host, args.steps))
        show(rows, f"host time of parameters of 8 x 8, process CPU, medians of {args.steps} steps", args)
        return
    if args.launches:
        rows = list(benchmark_launches.table(args.launches, args.world_size, args))
        show(rows, "collectives, operators and bytes of one rank in each step", args)
        return
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc_per_node=2 launch/benchmark.py")

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if args.store:  # of its own, beside that of torchrun
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, init_method=f"file://{args.store}", rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend)
    if args.kernel:
        from benchmark_update import measure

        for numel in args.params:
            rows = list(measure(int(numel * 1e6), args.steps, device))
            if dist.get_rank() == 0:
                what = f"the update of a shard of them, {args.steps} times, beside a copy"
                show(rows, title_of(int(numel * 1e6), what), args)
        leave()
        return
    if args.checkpoint:
        from benchmark_checkpoint import pauses, saving

        numel = numel_of(args.width, args.layers, args.context)
        for rows in (saving(args, device), pauses(args, device)):
            if dist.get_rank() == 0:
                show(rows, title_of(numel, f"{args.steps} rounds in {args.checkpoint}"), args)
        leave()
        return
    if args.alone:
        found = alone(args.alone, args, device)
        if dist.get_rank() == 0:
            print(json.dumps(found))
        leave()
        return
    names = [args.reference, *(name for name in args.only if name != args.reference)]
    peaks = {} if args.no_peaks else peaks_of([name for name in names if name not in LIMITS], args)
    numel = numel_of(args.width, args.layers, args.context)
    implementations = [
        Limit(name, numel, device) if name in LIMITS else Implementation(name, args, device) for name in names
    ]
    for step, tokens in enumerate(batches(args, device)):
        turn = step % len(implementations)
        for implementation in implementations[turn:] + implementations[:turn]:
            implementation.step(tokens)
    rows = results(implementations, peaks, args, device)
    if dist.get_rank() == 0:
        title = title_of(numel, f"{args.steps} steps; ratios to {args.reference}")
        show(rows, title, args)
        if args.plot:
            from draw_benchmark import bars, written

            bars(args.plot, [(title, rows), *map(written, args.compare)])
    leave()


def leave() -> None:
    dist.barrier()
    time.sleep(0.2)  # see launch/train.py
    dist.destroy_process_group()


def title_of(numel: int, what: str) -> str:
    return f"{numel / 1e6:.1f} M parameters, {dist.get_world_size()} ranks, {what}"


def show(rows: list[dict[str, Any]], title: str, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    if args.json:
        args.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
