"""zeroadam.save: one plain file of the whole, and never less than what was there before."""

import os
import resource
import signal
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from state_checks import equal, trained
from torch import nn

import zeroadam
from zeroadam import ZeroAdamW
from zeroadam.plain_file import write_beside

Pair = namedtuple("Pair", "first second")


class Row(list):
    """Is built from its values, not from a list of them."""

    def __init__(self, *values: object) -> None:
        super().__init__(values)


def saved(folder: str) -> None:
    ours, plain, mine, _ = trained()
    other = ZeroAdamW([nn.Parameter(torch.ones(3))])
    schedule = torch.optim.lr_scheduler.ConstantLR(ours)
    file = f"{folder}/last.pt"
    zeroadam.save({"optimizers": [ours, (other, Pair(ours, 3))], "schedule": schedule.state_dict(), "mine": mine}, file)
    with torch.serialization.safe_globals([Pair]):
        loaded = torch.load(file, weights_only=True)
    first, (second, (again, three)) = loaded["optimizers"]
    assert equal(first["state"], plain.state_dict()["state"])
    assert equal(again["state"], first["state"])
    assert (second["state"][0]["step"], three) == (0, 3)
    ours.load_state_dict(first)  # on all ranks
    assert equal(mine, loaded["mine"])
    with pytest.raises(RuntimeError, match="this rank has a part"):
        ours.state_dict()  # nothing stays of the whole one
    assert os.listdir(folder) == ["last.pt"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_optimizers_stand_for_their_whole_state(run_ranks: Any, tmp_path: Path, world_size: int) -> None:
    run_ranks(saved, world_size, str(tmp_path))


def not_saved(folder: str) -> None:
    """A full disk, something that cannot be pickled on the rank that writes, a folder that is not there."""
    ours, *_ = trained()
    file, rank = Path(folder) / "last.pt", dist.get_rank()
    zeroadam.save({"optimizer": ours}, file, to=1)
    before = file.read_bytes()
    error: Any = OSError if rank == 1 else RuntimeError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    with pytest.raises((error, RuntimeError)):  # torch's writer has an error of its own in place of OSError
        zeroadam.save({"optimizer": ours}, file, to=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises((AttributeError, TypeError) if rank == 1 else RuntimeError):
        zeroadam.save({"optimizer": ours, "a lock": (lambda: 0) if rank == 1 else None}, file, to=1)
    with pytest.raises(UserWarning if rank == 1 else RuntimeError, match="left out of what is pickled"):
        zeroadam.save({"run": SimpleNamespace(optimizer=ours)}, file, to=1)
    other = ZeroAdamW([nn.Parameter(torch.ones(3))])
    names = ("one", "other") if rank == 1 else ("other", "one")
    with pytest.raises(RuntimeError, match="disagree on where optimizers are in what is to be saved"):
        zeroadam.save(dict(zip(names, (ours, other), strict=True)), file, to=1)
    with pytest.raises(error, match="No such file"):
        zeroadam.save({"optimizer": ours}, file.parent / "nowhere" / "last.pt", to=1)
    with pytest.raises(RuntimeError, match="this rank has a part"):
        torch.save({"optimizer": ours.state_dict()}, file)  # as in a script for AdamW
    dist.barrier()
    assert file.read_bytes() == before
    assert os.listdir(folder) == ["last.pt"]


def test_what_was_there_stays_if_it_cannot_be_saved(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(not_saved, 2, str(tmp_path))


def replaced(folder: str) -> None:
    file, link = Path(folder) / "real.pt", Path(folder) / "last.pt"
    optimizer = ZeroAdamW([nn.Parameter(torch.ones(3))])
    zeroadam.save({"optimizer": optimizer}, file)
    if dist.get_rank() == 0:
        file.chmod(0o600)
        link.symlink_to(file)
    zeroadam.save(OrderedDict(optimizer=optimizer, step=2), link)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    loaded = torch.load(file)
    assert type(loaded) is OrderedDict
    assert loaded["step"] == 2
    assert loaded["optimizer"]["state"][0]["step"] == 0
    long = Path(folder) / f"{'ä' * 120}.pt"  # 243 of the 255 bytes that a name may have
    zeroadam.save(Row(optimizer, 2), long)
    row = torch.load(long, weights_only=False)
    assert type(row) is Row
    assert row[1] == 2
    assert row[0].keys() == loaded["optimizer"].keys()


def test_links_modes_and_types_stay(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(replaced, 2, str(tmp_path))


def after_consolidation(folder: str) -> None:
    ours, plain, *_ = trained()
    ours.consolidate_state_dict()
    dcp.save({"optimizer": ours}, checkpoint_id=folder)
    state = {"optimizer": ours.state_dict(sharded=True)}
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].to_local().zero_()
    dcp.load(state, checkpoint_id=folder)
    ours.consolidate_state_dict()
    if dist.get_rank() == 0:
        assert equal(ours.state_dict()["state"], plain.state_dict()["state"])


def test_a_checkpoint_has_the_shards_of_all_ranks_also_after_consolidation(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(after_consolidation, 2, str(tmp_path))


def to_nowhere(folder: str) -> None:
    file = Path(folder) / "last.pt"
    for obj in ({"x": 1}, {"optimizer": ZeroAdamW([nn.Parameter(torch.ones(3))])}):
        for to in (7, "all"):
            with pytest.raises(ValueError, match=f"there is no rank {to!r}"):
                zeroadam.save(obj, file, to=to)  # type: ignore[arg-type]
    assert not file.exists()
    pipe = Path(folder) / f"pipe{dist.get_rank()}"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_beside({"x": 1}, pipe)
    assert pipe.is_fifo()
    assert os.read(reader, 2) == b"PK"
    os.close(reader)


def test_a_file_that_is_none_and_a_rank_that_is_none(run_ranks: Any, tmp_path: Path) -> None:
    """A device or a pipe stays what it is."""
    run_ranks(to_nowhere, 2, str(tmp_path))
