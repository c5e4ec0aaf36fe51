"""Kill a training run again and again, in every way and at every moment, and compare its end with an undisturbed one.

    OMP_NUM_THREADS=1 python launch/soak.py --kills 1000 --seed 0 --world-size 2 --hook reduce_scatter

launch/train.py trains a small model and saves every three steps. Each round begins anew and ends bit-equal to the run
that nobody disturbed, or the program says how and exits with 1. The folder of a round that went wrong stays. On Linux.
"""

import argparse
import importlib
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from agent import Agent, kill

HERE = Path(__file__).parent
EVERY = 3  # steps between checkpoints
KILLS_PER_ROUND = 25
TINY = [
    *("--width", "32", "--heads", "2", "--layers", "1", "--context", "32", "--batch-size", "4", "--warmup", "5"),
    *("--eval-every", "100", "--eval-batches", "2", "--sample", "20", "--data", str(HERE.parent / "zeroadam")),
]


def steps(folder: Path) -> list[int]:
    """Of the whole checkpoints."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdecimal())


def newest_step(folder: Path) -> int:
    return max(steps(folder), default=0)


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is being written: a part of one, behind the newest that is whole."""
    return any(int(path.stem[5:]) > newest_step(folder) for path in folder.glob("step-*.tmp"))


def final(folder: Path) -> Any:
    """The newest checkpoint as plain PyTorch."""
    path = folder / f"step-{newest_step(folder):08d}"
    subprocess.run(
        [sys.executable, "-m", "zeroadam", "export", str(path), f"{folder}.pt"], check=True, stdout=subprocess.DEVNULL
    )
    return torch.load(f"{folder}.pt", weights_only=True)


def is_equal(one: Any, other: Any) -> bool:
    """To the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


class Round:
    """A run that is disturbed until it has ended as many processes as it should."""

    def __init__(self, folder: Path, options: Sequence[str], generator: random.Random, count: Counter[str]) -> None:
        self.folder, self.options, self.generator, self.count = folder, options, generator, count
        self.checkpoints = folder / "shaken"
        self.agent = self.start()

    def start(self, file_blocks: int | None = None) -> Agent:
        log = self.folder / f"log-{len(list(self.folder.glob('log-*'))):03d}"
        return Agent(log, *self.options, "--checkpoint-dir", str(self.checkpoints), file_blocks=file_blocks)

    def run(self, kills: int) -> int:
        """Returns how many processes were killed, at least `kills` unless it was done before."""
        before = self.killed
        with_worker = (self.worker, self.worker_while_saving, self.two, self.at_start, self.while_loading)
        ways = [*with_worker, self.terminate, self.kill_agent, self.stop, self.full_disk, self.delete]
        while self.killed < before + kills and not self.is_done:
            self.generator.choice(ways)()
        self.agent.wait_for(lambda: self.is_done, seconds=1800)
        assert self.agent.process.wait(timeout=60) == 0, self.agent.log.read_text()[-5000:]
        return self.killed - before

    @property
    def killed(self) -> int:
        return sum(number for what, number in self.count.items() if what.startswith("killed"))

    @property
    def is_done(self) -> bool:
        return self.agent.process.poll() is not None

    def progress(self) -> None:
        """Wait until the run has workers that have written a checkpoint, and a moment more."""
        step = newest_step(self.checkpoints)
        self.agent.wait_for(lambda: newest_step(self.checkpoints) > step or self.is_done)
        time.sleep(self.generator.uniform(0, 0.2))

    def kill_workers(self, how_many: int, what: str) -> None:
        workers = self.agent.workers()
        if len(workers) < how_many:
            return
        saving = is_saving(self.checkpoints)
        for pid in self.generator.sample(workers, how_many):
            kill(pid)
        self.count[f"killed workers, {what}"] += how_many
        self.count["of these, while a checkpoint was being written"] += how_many * (
            saving and is_saving(self.checkpoints)
        )
        self.agent.wait_for(lambda: set(self.agent.workers()).isdisjoint(workers) or self.is_done)

    def worker(self) -> None:
        self.progress()
        self.kill_workers(1, "one")

    def worker_while_saving(self) -> None:
        self.progress()
        self.agent.wait_for(lambda: is_saving(self.checkpoints) or self.is_done)
        self.kill_workers(1, "one while saving")

    def two(self) -> None:
        self.progress()
        self.kill_workers(2, "two at once")

    def at_start(self) -> None:
        """Of workers that have begun to import."""
        self.worker()
        self.agent.wait_for(lambda: self.agent.workers() or self.is_done)
        time.sleep(self.generator.uniform(0, 1))
        self.kill_workers(1, "at start")

    def while_loading(self) -> None:
        """Of workers that have opened the checkpoint, or a moment later."""
        self.worker()
        self.agent.wait_for(lambda: any(map(self.is_reading, self.agent.workers())) or self.is_done)
        self.kill_workers(1, "while loading")

    def is_reading(self, pid: int) -> bool:
        """Whether a process has a file of a whole checkpoint open, or holds the folder but has not resumed yet."""
        with suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    target = os.readlink(file)
                    if target.startswith(f"{self.checkpoints}/step-") and ".tmp" not in target:
                        return True
        return False

    def end_agent(self, number: int, what: str) -> None:
        workers = self.agent.workers()
        kill(self.agent.process.pid, number)
        self.agent.process.wait(timeout=60)
        self.count[f"killed agents, {what}"] += 1
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, f"workers {workers} outlive their torchrun"
            time.sleep(0.01)

    def terminate(self) -> None:
        self.progress()
        self.end_agent(signal.SIGTERM, "by TERM")
        self.agent = self.start()

    def kill_agent(self) -> None:
        self.progress()
        self.end_agent(signal.SIGKILL, "by KILL")
        self.agent = self.start()

    def stop(self) -> None:
        """A worker that does nothing for a second is waited for."""
        self.progress()
        for pid in self.agent.workers()[:1]:
            kill(pid, signal.SIGSTOP)
            time.sleep(1)
            kill(pid, signal.SIGCONT)
            self.count["stopped for a second"] += 1

    def full_disk(self) -> None:
        """Checkpoints that cannot be written are reported, and none of those before is lost."""
        self.progress()
        self.end_agent(signal.SIGTERM, "by TERM")
        before = steps(self.checkpoints)
        self.agent = self.start(file_blocks=40)
        self.agent.wait_for(lambda: "no checkpoint of step" in self.agent.log.read_text() or self.is_done)
        self.end_agent(signal.SIGKILL, "by KILL with a full disk")
        assert before == steps(self.checkpoints), f"{before} have become {steps(self.checkpoints)}"
        self.agent = self.start()

    def delete(self) -> None:
        """The newest checkpoint is gone, or all of them: an older one serves, or the run begins anew."""
        self.progress()
        everything = self.generator.random() < 0.3
        self.end_agent(signal.SIGKILL, "by KILL, and checkpoints deleted")
        if everything:
            shutil.rmtree(self.checkpoints)
        else:
            shutil.rmtree(self.checkpoints / f"step-{newest_step(self.checkpoints):08d}")
        self.agent = self.start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000, help="processes to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--hook", default="reduce_scatter", help="of launch/train.py; none: DDP's own all-reduce")
    parser.add_argument("--steps", type=int, default=200, help="of a run")
    parser.add_argument("--folder", type=Path, help="to work in, instead of a temporary one")
    parser.add_argument(
        "--fork", action="store_true", help="start processes with torch already imported, for more kills per minute"
    )
    args = parser.parse_args()
    if args.fork:
        Agent.forks = True
        runpy.run_path(f"{HERE}/train.py")  # imports what the workers need
        importlib.import_module("torch._dynamo")  # as building an optimizer does
    work = Path(tempfile.mkdtemp(prefix="soak-", dir=args.folder))
    options = ["--standalone", f"--nproc-per-node={args.world_size}"]
    train = [f"{HERE}/train.py", *TINY, "--hook", args.hook, "--steps", str(args.steps), "--checkpoint-every"]
    start = time.monotonic()
    with Agent(work / "log", *options, *train, str(args.steps), "--checkpoint-dir", f"{work}/steady") as agent:
        assert agent.process.wait() == 0, agent.log.read_text()[-5000:]
    expected, count, generator = final(work / "steady"), Counter[str](), random.Random(args.seed)
    killed = rounds = 0
    while killed < args.kills:
        folder = work / f"round-{rounds}"
        folder.mkdir()
        command = [*options, "--max-restarts=10000", *train, str(EVERY)]
        one = Round(folder, command, generator, count)
        try:
            killed += one.run(min(KILLS_PER_ROUND, args.kills - killed))
            assert is_equal(final(one.checkpoints), expected), f"other numbers than undisturbed, in {folder}"
        finally:
            with one.agent:
                pass  # it ends whatever happens
        rounds += 1
        shutil.rmtree(folder)
        print(
            f"{killed} of {args.kills} kills, {rounds} rounds bit-equal, {time.monotonic() - start:.0f} s", flush=True
        )
    shutil.rmtree(work)
    for what, number in sorted(count.items()):
        print(f"{number:6} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
