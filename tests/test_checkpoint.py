"""Checkpoints of torch.distributed.checkpoint: any number of ranks, other libraries' optimizers, damaged files."""

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adam_reference import assert_same, parameters, set_gradients
from checkpoint_nets import application, build, steps
from measure import io_bytes, memory, start_peak
from on_a_backend import on_a_backend
from state_checks import MB, OPTIONS, SLACK, assert_goes_on, equal, snapshot, trained
from torch import nn
from torch.distributed.checkpoint.state_dict import set_state_dict

from zeroadam import ZeroAdamW, checkpoint

WORLD_SIZES = [1, 2, 3, 5]


def save(folder: str, background: bool = True) -> None:
    ours, _, mine, _ = trained()
    dcp.save({"optimizer": ours}, checkpoint_id=f"{folder}/direct")
    dcp.save(application(nn.ParameterList(mine), ours), checkpoint_id=f"{folder}/by name")
    if not background:
        return
    future = dcp.async_save({"optimizer": ours.state_dict(sharded=True)}, checkpoint_id=f"{folder}/async")
    set_gradients(9, mine)
    ours.step()  # which the copy being saved does not see
    future.result()


def load(folder: str, roads: dict[str, Callable[..., None]]) -> None:
    _, plain, _, theirs = trained()
    for kind, road in roads.items():
        mine = parameters()
        with torch.no_grad():
            for p in mine:
                p.zero_()
        ours, model = ZeroAdamW(mine, lr=1.0, **OPTIONS), nn.ParameterList(mine)
        if kind == "by name":
            state = application(model, ours)
            road(state, checkpoint_id=f"{folder}/{kind}")
            set_state_dict(model, ours, model_state_dict=state["model"], optim_state_dict=state["optim"])
        else:
            with torch.no_grad():
                for p, q in zip(mine, theirs, strict=True):
                    p.copy_(q)
            road({"optimizer": ours}, checkpoint_id=f"{folder}/{kind}")
        assert_same(ours, plain)
    assert_goes_on(ours, plain)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.slow
def test_saved_at_any_number_of_ranks_and_loaded_at_any_other(run_ranks, tmp_path: Path, world_size: int) -> None:
    run_ranks(save, world_size, str(tmp_path))
    for other in WORLD_SIZES:
        run_ranks(load, other, str(tmp_path), {"by name": checkpoint.load})
    following = WORLD_SIZES[WORLD_SIZES.index(world_size) - 1]
    run_ranks(load, following, str(tmp_path), {"direct": dcp.load, "async": checkpoint.load, "by name": dcp.load})


@on_a_backend(1, 2, 3, 4)
@pytest.mark.slow
def test_saved_and_loaded_on_the_code_path_of_nccl(run_ranks, tmp_path: Path, transport: str, world_size: int) -> None:
    """Not in the background, for which torch needs a process group of its own there."""
    run_ranks(save, world_size, str(tmp_path), False, transport=transport)
    roads = {"by name": checkpoint.load, "direct": checkpoint.load}
    run_ranks(load, 1 + world_size % 4, str(tmp_path), roads, transport=transport)


def shares(folder: str) -> list[int]:
    params = [nn.Parameter(torch.zeros(512, 1024)) for _ in range(8)]
    optimizer = ZeroAdamW(params)
    for param in params:
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key].to_local().fill_(1.0)
    dist.barrier()
    start = start_peak()
    written = io_bytes("wchar")
    dcp.save(optimizer.state_dict(sharded=True), checkpoint_id=folder)
    written = io_bytes("wchar") - written
    saving = memory("VmHWM") - start
    state_dict = optimizer.state_dict(sharded=True)
    dcp.load(state_dict, checkpoint_id=folder)  # reads torch's own modules as well
    start = start_peak()
    read = io_bytes("rchar")
    dcp.load(state_dict, checkpoint_id=folder)
    read = io_bytes("rchar") - read
    optimizer.load_state_dict(state_dict)
    return [written, read, saving, memory("VmHWM") - start]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes are counted by Linux's /proc")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_writes_and_reads_its_share_in_a_bounded_buffer(run_ranks, tmp_path: Path, world_size: int) -> None:
    """32 MB of state in 16 pieces: a rank's share to 2 %, and memory for few of the pieces in it.

    torch keeps a piece that it has read until Python's garbage collector comes by.
    """
    share, piece = 32 * MB // world_size, 2 * MB // world_size
    for written, read, saving, loading in run_ranks(shares, world_size, str(tmp_path / "checkpoint")):
        assert share <= written <= 1.02 * share
        assert (
            share <= read <= share + 16 * 2**16
        )  # torch looks through the last 64 KB of every piece for its directory
        assert saving <= 6 * piece + SLACK
        assert loading <= 6 * piece + SLACK


def write_with(kind: str, folder: str) -> dict[str, Any]:
    model, optimizer = build(kind)
    steps(model, optimizer, 0)
    dcp.save(application(model, optimizer), checkpoint_id=folder)
    return steps(model, optimizer, 3)


def read_with(kind: str, folder: str, road: str) -> dict[str, Any]:
    model, optimizer = build(kind, lr=1.0)
    state = application(model, optimizer)
    (checkpoint.load if road == "ours" else dcp.load)(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return steps(model, optimizer, 3)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("zeroadam", "zeroadam"), ("zeroadam", "ddp"), ("zeroadam", "fsdp2"), ("ddp", "zeroadam"), ("fsdp2", "zeroadam")],
)
def test_exchange_with_ddp_and_fsdp2(run_ranks, tmp_path: Path, writer: str, reader: str) -> None:
    """Written by one at two ranks, read by another at three, which then trains on as the first one did."""
    expected = run_ranks(write_with, 2, writer, f"{tmp_path}/checkpoint")[0]
    for road in ("torch's", "ours"):
        for found in run_ranks(read_with, 3, reader, f"{tmp_path}/checkpoint", road):
            assert equal(found, expected)


def save_small(folder: str, cast: bool = False, groups: int = 2) -> None:
    model, optimizer = small(cast, groups)
    set_gradients(0, list(model.parameters()))
    optimizer.step()
    dcp.save(application(model, optimizer), checkpoint_id=folder)


def small(cast: bool = False, groups: int = 2, width: int = 6, without: int = 0) -> tuple[nn.Module, ZeroAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 4))
    if cast:
        model.to(torch.bfloat16)
    return model, ZeroAdamW([{"params": list(model.parameters())[i::groups]} for i in range(groups - without)])


def everything(model: nn.Module, optimizer: ZeroAdamW) -> Any:
    return copy.deepcopy(model.state_dict()), snapshot(optimizer)


def refused(folder: str, message: str, options: dict[str, Any]) -> None:
    model, optimizer = small(**options)
    before = everything(model, optimizer)
    state = application(model, optimizer)
    with pytest.raises((ValueError, RuntimeError), match=message):
        checkpoint.load(state, checkpoint_id=folder)
    assert equal(everything(model, optimizer), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7}, "does not fit, says rank 0: Size mismatch .* for model.0.weight"),
        ({"cast": True}, "torch.float32 in the checkpoint, here torch.bfloat16"),
        ({"groups": 1}, "group 0 in .* has 1.weight where that of the optimizer has 0.bias"),
        ({"without": 1}, "more than the 1 param groups of the optimizer"),
        ({"groups": 3}, "group 0 in .* has 1.weight where that of the optimizer has 1.bias"),
    ],
    ids=str,
)
def test_a_checkpoint_of_something_else_is_refused(run_ranks, tmp_path: Path, options: Any, message: str) -> None:
    run_ranks(save_small, 3, f"{tmp_path}/checkpoint")
    run_ranks(refused, 2, f"{tmp_path}/checkpoint", message, options)


def test_a_folder_without_checkpoint_is_refused(run_ranks, tmp_path: Path) -> None:
    run_ranks(refused, 2, str(tmp_path), "holds no checkpoint", {})


def damaged(folder: str) -> tuple[int, int]:
    """(refused, loaded) of many copies with one flipped bit, or cut short; the numbers are never other ones."""
    logging_off()
    model, optimizer = small()
    good = application(model, optimizer)
    before = everything(model, optimizer)
    checkpoint.load(good, checkpoint_id=folder)
    wanted = everything(model, optimizer)
    assert not equal(before, wanted)
    counts = [0, 0]
    generator = random.Random(0)
    files = sorted(file.name for file in Path(folder).iterdir())
    for trial in range(90):
        name, cut, where = generator.choice(files), trial % 3 == 0, generator.random()
        bad = f"{folder} {trial}"
        if dist.get_rank() == 0:
            shutil.copytree(folder, bad)
            raw = bytearray(Path(bad, name).read_bytes())
            position = int(where * len(raw))
            if cut:
                del raw[position:]
            else:
                raw[position] ^= 1 << generator.randrange(8)
            Path(bad, name).write_bytes(raw)
        else:
            generator.randrange(8) if not cut else None
        dist.barrier()
        model, optimizer = small()
        try:
            checkpoint.load(application(model, optimizer), checkpoint_id=bad)
            counts[1] += 1
            assert not cut
            assert equal(everything(model, optimizer)[0], wanted[0])
            assert equal(everything(model, optimizer)[1][0], wanted[1][0])
        except (ValueError, RuntimeError):
            counts[0] += 1
            assert equal(everything(model, optimizer), before)
    return counts[0], counts[1]


def logging_off() -> None:
    """torch logs every failing load, with tracebacks."""
    import logging

    logging.disable(logging.CRITICAL)


@pytest.mark.slow
def test_damaged_files_are_refused_and_change_nothing(run_ranks, tmp_path: Path) -> None:
    """Of flipped bits, those are let pass that change no number: in padding, or in fields that nobody reads."""
    run_ranks(save_small, 2, f"{tmp_path}/checkpoint")
    for refused_copies, loaded in run_ranks(damaged, 2, f"{tmp_path}/checkpoint"):
        assert refused_copies >= 45
        assert loaded <= 45
