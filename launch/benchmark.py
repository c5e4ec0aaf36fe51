"""Time training steps of several optimizers side by side: in one process group, on the same model, data and seed.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 launch/benchmark.py --width 384 --layers 6
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 launch/benchmark.py --checkpoint /dev/shm/checkpoints
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=1 launch/benchmark.py --kernel

The implementations take turns, step by step, so that whatever else the machine is doing meets all of them alike. Each
step of each is compared with the step of DDP + fused AdamW in the same round.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from implementations import REFERENCE, Implementation, installed
from measure import memory, start_peak
from train import GPT


def measured(implementation: Implementation, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Of every measured step, the most that any rank took."""
    rows = [list(step.values()) for step in implementation.steps[warmup:]]
    table = torch.tensor(rows, device=device, dtype=torch.float64).T.contiguous()
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return dict(zip(implementation.steps[0], table.tolist(), strict=True))


def results(
    implementations: list[Implementation], args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    reference = measured(implementations[0], args.warmup, device)
    expected = implementations[0].parameters()
    numel = sum(param.numel() for param in expected)
    rows = []
    for implementation in implementations:
        found = measured(implementation, args.warmup, device)
        ratios = sorted(mine / its for mine, its in zip(found["wall"], reference["wall"], strict=True))
        cpu = [mine / its for mine, its in zip(found["CPU"], reference["CPU"], strict=True)]
        bitwise = [torch.equal(mine, its) for mine, its in zip(implementation.parameters(), expected, strict=True)]
        rows.append(
            {
                "implementation": implementation.name,
                "ratio": statistics.median(ratios),
                "p10": ratios[len(ratios) // 10],
                "p90": ratios[len(ratios) * 9 // 10],
                "CPU ratio": statistics.median(cpu),
                "ms": 1000 * statistics.median(found["wall"]),
                "forward, backward, ms": 1000 * statistics.median(found["forward and backward"]),
                "step, ms": 1000 * statistics.median(found["step"]),
                "CPU, ms": 1000 * statistics.median(found["CPU"]),
                "sent, bytes/param": statistics.median(found["sent"]) / local_ranks() / numel,
                "state, MB": implementation.state_bytes() / 1e6,
                "peak, MB": implementation.peak / 1e6,
                "bitwise": all(bitwise),
            }
        )
    return rows


def local_ranks() -> int:
    """That share this one's network interfaces."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def main() -> None:
    names = installed()
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
        help=f"besides {REFERENCE}: {'; '.join(names[1:])}",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="time saving and loading instead, in this folder"
    )
    parser.add_argument("--kernel", action="store_true", help="time the update alone instead, beside a copy")
    parser.add_argument("--params", nargs="+", type=float, default=[20], help="with --kernel: millions of a shard")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.kernel:
        from benchmark_update import measure

        for numel in args.params:
            rows = list(measure(int(numel * 1e6), args.steps, device))
            if dist.get_rank() == 0:
                show(rows, int(numel * 1e6), args, f"the update of a shard of them, {args.steps} times, beside a copy")
        leave()
        return
    if args.checkpoint:
        from benchmark_checkpoint import saving, snapshots

        numel = sum(param.numel() for param in GPT(args.width, args.layers, 1, args.context).parameters())
        for rows in (saving(args, device), snapshots(args, device)):
            if dist.get_rank() == 0:
                show(rows, numel, args, f"{args.steps} rounds in {args.checkpoint}")
        leave()
        return
    data = torch.Generator().manual_seed(dist.get_rank())
    batches = [
        torch.randint(256, (args.batch_size, args.context + 1), generator=data).to(device)
        for _ in range(args.warmup + args.steps)
    ]
    implementations = []
    for name in (REFERENCE, *(name for name in args.only if name != REFERENCE)):
        before = start_peak()  # alone, before the next is built
        implementations.append(Implementation(name, args, device))
        for tokens in batches[: args.warmup]:
            implementations[-1].step(tokens)
        implementations[-1].peak = memory("VmHWM") - before
    for step, tokens in enumerate(batches[args.warmup :]):
        turn = step % len(implementations)
        for implementation in implementations[turn:] + implementations[:turn]:
            implementation.step(tokens)
    rows = results(implementations, args, device)
    if dist.get_rank() == 0:
        numel = sum(param.numel() for param in implementations[0].parameters())
        show(rows, numel, args, f"{args.steps} steps; ratios to {REFERENCE}")
    leave()


def leave() -> None:
    dist.barrier()
    time.sleep(0.2)  # see launch/train.py
    dist.destroy_process_group()


def show(rows: list[dict[str, Any]], numel: int, args: argparse.Namespace, what: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{numel / 1e6:.1f} M parameters, {dist.get_world_size()} ranks, {what}")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=130).print(table)
    if args.json:
        args.json.write_text(json.dumps({"parameters": numel, "ranks": dist.get_world_size(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
