"""Time training steps of several optimizers side by side: in one process group, on the same model, data and seed.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 launch/benchmark.py --width 384 --layers 6
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 launch/benchmark.py --checkpoint /dev/shm/checkpoints

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
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from checkpoints import Checkpoints, Run
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from train import GPT, state_bytes

from zeroadam import ZeroAdamW, bf16_reduce_scatter_hook, checkpoint, reduce_scatter_hook

REFERENCE = "ddp + adamw"
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
WAYS = ["zero_redundancy, consolidated, torch.save", "zeroadam, consolidated, torch.save", "zeroadam, dcp.save"]


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


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


class Saving:
    """A way to save and load the optimizer's state alone, without the model."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device) -> None:
        self.name, self.sharded = name, name.endswith("dcp.save")
        implementation = Implementation(name.split(",")[0], args, device)
        implementation.step(torch.randint(256, (1, args.context + 1), device=device))
        self.optimizer = implementation.optimizer
        self.path = args.checkpoint / name.split(",")[0] / str(self.sharded)
        self.measured: list[dict[str, float]] = []

    def save(self) -> None:
        if self.sharded:
            dcp.save(self.optimizer.state_dict(), checkpoint_id=self.path)
            return
        self.optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.optimizer.state_dict(), self.path)
        dist.barrier()

    def load(self) -> None:
        if self.sharded:
            checkpoint.load(self.optimizer.state_dict(), checkpoint_id=self.path)
            return
        # ZeroRedundancyOptimizer goes on using what it is given: a mapped file must not be overwritten then.
        mmap = isinstance(self.optimizer, ZeroAdamW)
        self.optimizer.load_state_dict(torch.load(self.path, map_location="cpu", mmap=mmap))

    def measure(self) -> None:
        numbers = {}
        for name, action in (("save", self.save), ("load", self.load)):
            dist.barrier()
            before, written = start_peak(), io_bytes("wchar")
            start = time.perf_counter()
            action()
            dist.barrier()
            numbers[f"{name}, s"] = time.perf_counter() - start
            if name == "save":
                numbers["written, MB"] = (io_bytes("wchar") - written) / 1e6
            numbers[f"{name}, peak MB"] = (memory("VmHWM") - before) / 1e6
        self.measured.append(numbers)


def memory(key: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since the last `start_peak`."""
    return 1024 * _count("/proc/self/status", key)


def start_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def io_bytes(key: str) -> int:
    """That this process has read (rchar) or written (wchar) so far."""
    return _count("/proc/self/io", key)


def _count(file: str, key: str) -> int:
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(key)).split()[1])


def saving(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Save and load in turns; of every rank the median."""
    ways = [Saving(name, args, device) for name in WAYS]
    for _ in range(args.steps):
        for way in ways:
            way.measure()
    rows = []
    for way in ways:
        per_rank: list[Any] = [None] * dist.get_world_size()
        mine = {key: statistics.median(numbers[key] for numbers in way.measured) for key in way.measured[0]}
        dist.all_gather_object(per_rank, mine)
        rows.append(
            {"state of the optimizer": way.name}
            | {
                key: f"{mine[key]:.3f}"
                if key.endswith("s")
                else ", ".join(f"{numbers[key]:.1f}" for numbers in per_rank)
                for key in mine
            }
        )
    return rows


def snapshots(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Training that saves everything every few steps beside training that does not, ten steps in turns."""
    implementation = Implementation("zeroadam + hook", args, device)
    tokens = torch.randint(256, (args.batch_size, args.context + 1), device=device)
    run = Run(implementation.model, implementation.optimizer, LambdaLR(implementation.optimizer, lambda _: 1.0))
    folder = Checkpoints(args.checkpoint / "snapshots", keep=2)
    blocks: dict[int, list[float]] = {every: [] for every in (0, 1, 4, 10)}
    count = 0
    for _ in range(2 + args.steps):
        for every, seconds in blocks.items():
            dist.barrier()
            start = time.perf_counter()
            for step in range(10):
                implementation.step(tokens)
                if every and step % every == 0:
                    count += 1
                    folder.save(count, run.state_dict())
            folder.finish()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
    folder.close()
    rows = []
    for every, seconds in blocks.items():
        ratios = sorted(mine / plain for mine, plain in zip(seconds[2:], blocks[0][2:], strict=True))
        rows.append(
            {
                "model and optimizer saved": f"every {every} steps" if every else "never",
                "ratio": statistics.median(ratios),
                "ratio p10": ratios[len(ratios) // 10],
                "ratio p90": ratios[len(ratios) * 9 // 10],
                "ms per step": 100 * statistics.median(seconds[2:]),
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
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.checkpoint:
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
