"""`zeroadam export` and `zeroadam inspect`, started as a user starts them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from adam_reference import assert_same
from checkpoint_nets import Net, application, build, steps
from commands import COMMAND, zeroadam
from patience import at_most
from state_checks import OPTIONS, equal, trained
from torch import nn

import zeroadam as package


def write(folder: str, kinds: list[str]) -> dict[str, Any]:
    for kind in kinds:
        model, optimizer = build(kind)
        steps(model, optimizer, 0)
        dcp.save({"train": {"step": 3}, **application(model, optimizer)}, checkpoint_id=f"{folder}/{kind}")
    return steps(model, optimizer, 3)


def test_an_exported_checkpoint_is_trained_on_by_plain_adamw(run_ranks, tmp_path: Path) -> None:
    """Whoever wrote it, what AdamW then makes of it is what the writer would have made of it."""
    expected = run_ranks(write, 3, str(tmp_path), ["fsdp2", "ddp", "zeroadam"])[0]
    for kind in ("fsdp2", "ddp", "zeroadam"):
        done = zeroadam("export", f"{tmp_path}/{kind}", f"{tmp_path}/adamw.pt")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert equal(run_ranks(train_on, 1, f"{tmp_path}/adamw.pt")[0], expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adamw.pt", "ddp", "fsdp2", "zeroadam"]


def train_on(file: str) -> dict[str, Any]:
    model, optimizer = build("ddp", lr=1.0)
    saved = torch.load(file, weights_only=True)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return steps(model, optimizer, 3)


def write_direct(folder: str) -> None:
    ours, _, _, _ = trained()
    dcp.save(ours.state_dict(sharded=True), checkpoint_id=folder)


def test_a_state_dict_by_numbers_is_exported_as_well(run_ranks, tmp_path: Path) -> None:
    run_ranks(write_direct, 2, f"{tmp_path}/checkpoint")
    done = zeroadam("export", f"{tmp_path}/checkpoint", f"{tmp_path}/adamw.pt")
    assert done.returncode == 0, done.stderr
    run_ranks(compare_direct, 1, f"{tmp_path}/adamw.pt")


def compare_direct(file: str) -> None:
    _, plain, _, theirs = trained()
    loaded = torch.optim.AdamW(theirs, lr=1.0, **OPTIONS)
    saved = torch.load(file, weights_only=True)
    assert saved["model"] == {}
    loaded.load_state_dict(saved["optimizer"])
    assert_same(loaded, plain)


def test_inspect_shows_what_is_there(run_ranks, tmp_path: Path) -> None:
    run_ranks(write, 3, str(tmp_path), ["zeroadam"])
    done = zeroadam("inspect", f"{tmp_path}/zeroadam")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "written by 3 ranks, 3 files" in lines[0]
    assert lines[1] == "optimizer: optim, 2 param groups, step 3"
    rows = {line.split("  ")[0]: line.split() for line in lines[3:]}
    assert rows["first.weight"] == ["first.weight", "7", "x", "6", "float32", "168", "336", "3"]
    assert rows["norm.num_batches_tracked"] == ["norm.num_batches_tracked", "0-d", "int64", "8", "0", "-"]
    assert rows["frozen.bias"][-2:] == ["0", "-"]
    model_bytes = sum(value.nbytes for value in Net().state_dict().values())
    assert rows["total"][1] == f"{model_bytes:,}"


def test_the_folder_of_checkpoints_names_the_newest(run_ranks, tmp_path: Path) -> None:
    """By their steps, not by when they were written; of other names the last written; none that is not whole."""
    run_ranks(write, 1, str(tmp_path / "made"), ["zeroadam"])
    for name in ("step-00000300", "step-00000200", "step-00000400.set-aside-0", "step-00000400.tmp", "other"):
        shutil.copytree(tmp_path / "made" / "zeroadam", tmp_path / "runs" / name)
    for command in (["inspect"], ["export", f"{tmp_path}/adamw.pt"]):
        done = zeroadam(command[0], f"{tmp_path}/runs", *command[1:])
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"but {tmp_path}/runs/step-00000300 does, the newest below it" in done.stderr
    (tmp_path / "runs" / "step-00000300").rename(tmp_path / "runs" / "one")
    (tmp_path / "runs" / "step-00000200").rename(tmp_path / "runs" / "two")
    os.utime(tmp_path / "runs" / "two" / ".metadata", (2e9, 2e9))
    assert f"but {tmp_path}/runs/two does" in zeroadam("inspect", f"{tmp_path}/runs").stderr


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "zeroadam"]], ids=["command", "module"])
def test_version(command: list[Any]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=at_most(30))
    assert (done.returncode, done.stdout) == (0, f"zeroadam {package.__version__}\n"), done.stderr


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_errors_are_one_line_and_leave_nothing(run_ranks, tmp_path: Path, command: str) -> None:
    file = tmp_path / "out" / "adamw.pt"
    file.parent.mkdir()
    arguments = [str(file)] if command == "export" else []

    def refused(folder: Path, message: str) -> None:
        done = zeroadam(command, str(folder), *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not list(file.parent.iterdir())

    refused(tmp_path, "holds no checkpoint of torch.distributed.checkpoint")
    run_ranks(write, 2, str(tmp_path), ["zeroadam"])
    shutil.copytree(tmp_path / "zeroadam", tmp_path / "short")
    (tmp_path / "short" / ".metadata").write_bytes((tmp_path / "short" / ".metadata").read_bytes()[:-100])
    refused(tmp_path / "short", "short is damaged: ")
    (tmp_path / "zeroadam" / "__0_0.distcp").unlink()
    refused(tmp_path / "zeroadam", "No such file")
    torch.manual_seed(0)
    dcp.save({"model": nn.Linear(2, 2).state_dict()}, checkpoint_id=tmp_path / "no optimizer", no_dist=True)
    refused(tmp_path / "no optimizer", "should hold the state dict of one optimizer, found: none")


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(run_ranks, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    run_ranks(write, 2, str(tmp_path), ["zeroadam"])
    (tmp_path / "adamw.pt").write_text("old")
    limited = f'ulimit -f 4; trap "" XFSZ; exec {COMMAND} export {tmp_path}/zeroadam {tmp_path}/adamw.pt'
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=at_most(30))
    assert done.returncode == 1
    assert done.stderr.startswith("zeroadam export: ")
    assert (tmp_path / "adamw.pt").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adamw.pt", "zeroadam"]
