"""How long saving and loading the optimizer's state takes, and what it costs a training. See `launch/benchmark.py`."""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from implementations import Implementation
from measure import io_bytes, memory, start_peak
from torch.distributed.checkpoint.state_dict import get_state_dict

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


class Background:
    """A way to save model and optimizer while training goes on."""

    def __init__(self, name: str, implementation: Implementation, folder: Path) -> None:
        self.name, self.implementation, self.folder, self.count = name, implementation, folder / name, 0
        self.objects = {"model": implementation.model, "optimizer": implementation.optimizer}
        self.manager: checkpoint.Manager | None = None
        self.future: Any = None
        if name.startswith("Manager"):
            self.manager = checkpoint.Manager(self.folder, in_background="in_background" not in name, **self.objects)
        else:
            self.group = dist.new_group(backend="gloo")
        self.paused, self.slowest, self.quiet, self.seconds = list[float](), list[float](), list[float](), list[float]()

    def save(self) -> None:
        self.count += 1
        if self.manager is not None:
            self.manager.save(self.count)
        elif self.name == "dcp.async_save":
            model, optimizer = get_state_dict(*self.objects.values())
            shutil.rmtree(self.folder, ignore_errors=True)
            state = {"model": model, "optimizer": optimizer}
            self.future = dcp.async_save(state, checkpoint_id=self.folder, process_group=self.group)

    def is_done(self) -> bool:
        """Whether nothing is being written, on any rank."""
        writing = self.manager is not None and self.manager.is_writing()
        writing = writing or (self.future is not None and not self.future.done())
        answer = torch.tensor(int(writing))
        dist.all_reduce(answer)
        return not answer.item()

    def block(self, tokens: torch.Tensor) -> None:
        """Steps without saving, and then from a save on until all is written, at least one."""
        for _ in range(4):
            start = time.perf_counter()
            self.implementation.step(tokens)
            self.quiet.append(time.perf_counter() - start)
        begin, during = time.perf_counter(), list[float]()
        while not during or not self.is_done():
            start = time.perf_counter()
            if not during:
                self.save()
                self.paused.append(time.perf_counter() - start)
            self.implementation.step(tokens)
            during.append(time.perf_counter() - start)
        self.seconds.append(time.perf_counter() - begin)
        self.slowest.append(max(during))


WAYS_TO_SAVE = ["nothing", "Manager", "Manager, in_background=False", "dcp.async_save"]


def pauses(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """What a save costs a training: the slowest step until it is written, beside steps without one."""
    implementation = Implementation("zeroadam + hook", args, device)
    tokens = torch.randint(256, (args.batch_size, args.context + 1), device=device)
    for _ in range(3):
        implementation.step(tokens)
    ways = [Background(name, implementation, args.checkpoint) for name in WAYS_TO_SAVE]
    for way in ways:
        way.block(tokens)  # which is not counted
        for numbers in (way.paused, way.slowest, way.quiet, way.seconds):
            numbers.clear()
    for _ in range(args.steps):
        for way in ways:
            way.block(tokens)
    median = statistics.median(seconds for way in ways for seconds in way.quiet)
    rows = []
    for way in ways:
        ratios = sorted(seconds / median for seconds in way.slowest)
        rows.append(
            {
                "model and optimizer saved by": way.name,
                "slowest step": statistics.median(ratios),
                "least": ratios[0],
                "most": ratios[-1],
                "pause, ms": 1000 * statistics.median(way.paused),
                "written after, s": statistics.median(way.seconds) if way.name != "nothing" else "",
            }
        )
        if way.manager is not None:
            way.manager.close()
    rows.append(
        {
            "model and optimizer saved by": f"(a step takes {1000 * median:.0f} ms)",
            **dict.fromkeys(list(rows[0])[1:], ""),
        }
    )
    return rows
