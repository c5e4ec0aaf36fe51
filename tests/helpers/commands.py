"""Starts what a user starts: torchrun, launch/train.py, the zeroadam command; and waits for what they do."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from patience import at_most

from zeroadam import cli as zeroadam_cli

ROOT = Path(__file__).parents[2]


RUN_SECONDS = at_most(50)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


SMALL = [
    *("--width", "32", "--heads", "2", "--layers", "1", "--context", "32", "--batch-size", "4"),
    *("--eval-every", "10", "--eval-batches", "2", "--sample", "20", "--data", str(ROOT / "zeroadam")),
]


def environment(folder: Path | str) -> dict[str, str]:
    """For a torchrun that leaves the folder for its logs there, as it never removes it."""
    return {**os.environ, "TMPDIR": str(folder)}


def torchrun(
    world_size: int, *command: str, cwd: Path | None = None, anew: bool = False, imports: str = ""
) -> subprocess.CompletedProcess[str]:
    """anew: whether each process imports torch itself. imports: or lines that are run before workers are forked."""
    if anew:
        return _torchrun_anew([*TORCHRUN, f"--nproc-per-node={world_size}", *command], cwd)
    arguments = [*TORCHRUN[2:], f"--nproc-per-node={world_size}", *command]
    with tempfile.TemporaryDirectory() as folder:
        return forked.run(partial(forked.torchrun, imports), arguments, RUN_SECONDS, cwd, environment(folder))


def _torchrun_anew(arguments: list[str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment(folder)
        ) as process,
    ):
        try:
            out, err = process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers, which are sessions of their own
            out, err = process.communicate(timeout=at_most(35))
            pytest.fail(f"no end after {RUN_SECONDS} s:\n{out}\n{err}")
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def output_of(script: str, folder: Path) -> str:
    """What a script of a page prints on two ranks."""
    (folder / "script.py").write_text(script)
    done = torchrun(2, "script.py", cwd=folder)
    if "terminate called without an active exception" in done.stderr:  # pytorch#56297, at exit: see launch/train.py
        done = torchrun(2, "script.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMAND = Path(sys.executable).with_name("zeroadam")


def zeroadam(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return forked.run(zeroadam_cli.main, ["zeroadam", *arguments], at_most(30), cwd)


def whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def final(folder: Path) -> Any:
    """The newest checkpoint as plain PyTorch."""
    done = zeroadam("export", str(whole(folder)[-1]), f"{folder}.pt")
    assert done.returncode == 0, done.stderr
    return torch.load(f"{folder}.pt", weights_only=True)


def newest_step(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in whole(folder)), default=0)


def until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + at_most(seconds)
    while not what():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def on_one_host(ranks: int, folder: Path, *arguments: str) -> dict[str, Any]:
    """What launch/train.py finds where nothing happens to it."""
    done = torchrun(ranks, f"{ROOT}/launch/train.py", *arguments, "--json", f"{folder}/one.json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "one.json").read_text())
    return found
