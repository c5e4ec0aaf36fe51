"""How long saving and loading the optimizer's state takes, and what it costs a training. See `launch/benchmark.py`."""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from implementations import Implementation
from measure import io_bytes, memory, start_peak

from zeroadam import ZeroAdamW, checkpoint

WAYS = ["zero_redundancy, consolidated, torch.save", "zeroadam, consolidated, torch.save", "zeroadam, dcp.save"]


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
            dcp.save(self.optimizer.state_dict(sharded=True), checkpoint_id=self.path)
            return
        self.optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.optimizer.state_dict(), self.path)
        dist.barrier()

    def load(self) -> None:
        if self.sharded:
            checkpoint.load(self.optimizer.state_dict(sharded=True), checkpoint_id=self.path)
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
    objects = {"model": implementation.model, "optimizer": implementation.optimizer}
    folder = checkpoint.Manager(args.checkpoint / "snapshots", **objects)
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
                    folder.save(count)
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
