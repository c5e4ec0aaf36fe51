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
import torch.nn.functional as F
from measure import now
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from train import GPT, state_bytes

from zeroadam import ZeroAdamW, bf16_reduce_scatter_hook, reduce_scatter_hook

REFERENCE = "ddp + adamw"
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}


class Implementation:
    """A model under DDP with its optimizer, and the seconds of its steps on this rank."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device) -> None:
        self.name = name
        torch.manual_seed(0)
        gpt = GPT(args.width, args.layers, args.width // 64, args.context).to(device)
        self.model = DistributedDataParallel(gpt, gradient_as_bucket_view=True)
        params = list(self.model.parameters())
        if name == REFERENCE:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, **OPTIONS)
        elif name == "zero_redundancy":
            self.optimizer = ZeroRedundancyOptimizer(
                params, torch.optim.AdamW, parameters_as_bucket_view=True, **OPTIONS
            )
        else:
            self.optimizer = ZeroAdamW(params, **OPTIONS)
            if name != "zeroadam":
                hook = bf16_reduce_scatter_hook if name == "zeroadam + bf16 hook" else reduce_scatter_hook
                self.model.register_comm_hook(self.optimizer, hook)
        self.seconds: list[tuple[float, float, float]] = []  # forward and backward, step, CPU time of both

    def step(self, tokens: torch.Tensor) -> None:
        dist.barrier()
        start, cpu = now(tokens.device), time.process_time()
        F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        middle = now(tokens.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append((middle - start, now(tokens.device) - middle, time.process_time() - cpu))


def slowest(implementation: Implementation, warmup: int) -> list[list[float]]:
    """Of every measured step, the most that any rank took: [wall, forward and backward, step, CPU] x [steps]."""
    rows = [[fb + step, fb, step, cpu] for fb, step, cpu in implementation.seconds[warmup:]]
    device = next(implementation.model.parameters()).device
    seconds = torch.tensor(rows, device=device).T.contiguous()
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.tolist()


def results(implementations: list[Implementation], warmup: int) -> list[dict[str, Any]]:
    reference = implementations[0]
    reference_seconds = slowest(reference, warmup)
    rows = []
    for implementation in implementations:
        seconds = slowest(implementation, warmup)
        ratios = sorted(mine / its for mine, its in zip(seconds[0], reference_seconds[0], strict=True))
        cpu = [mine / its for mine, its in zip(seconds[3], reference_seconds[3], strict=True)]
        pairs = zip(implementation.model.parameters(), reference.model.parameters(), strict=True)
        rows.append(
            {
                "implementation": implementation.name,
                "ratio": statistics.median(ratios),
                "ratio p10": ratios[len(ratios) // 10],
                "ratio p90": ratios[len(ratios) * 9 // 10],
                "CPU ratio": statistics.median(cpu),
                "ms": 1000 * statistics.median(seconds[0]),
                "forward and backward, ms": 1000 * statistics.median(seconds[1]),
                "step, ms": 1000 * statistics.median(seconds[2]),
                "state, MB": state_bytes(implementation.optimizer) / 1e6,
                "bitwise": all(torch.equal(mine, its) for mine, its in pairs),
            }
        )
    return rows


def main() -> None:
    names = [REFERENCE, "zero_redundancy", "zeroadam", "zeroadam + hook", "zeroadam + bf16 hook"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="measured, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per rank")
    parser.add_argument("--only", nargs="+", choices=names[1:], default=names[1:], help=f"besides {REFERENCE}")
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
    implementations = [Implementation(name, args, device) for name in (REFERENCE, *args.only)]
    data = torch.Generator().manual_seed(dist.get_rank())
    for step in range(args.warmup + args.steps):
        tokens = torch.randint(256, (args.batch_size, args.context + 1), generator=data).to(device)
        turn = step % len(implementations)
        for implementation in implementations[turn:] + implementations[:turn]:
            implementation.step(tokens)
    rows = results(implementations, args.warmup)
    if dist.get_rank() == 0:
        numel = sum(param.numel() for param in implementations[0].model.parameters())
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
