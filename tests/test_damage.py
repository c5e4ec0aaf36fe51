"""Checkpoints with flipped bits: refused in one line with nothing changed, or exactly right."""

import logging
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from zeroadam import ZeroAdamW, checkpoint
from zeroadam.checkpoint.metadata import ChunkStorageMetadata, _make_up
from zeroadam.cli.checkpoint_commands import export, inspect

# More can be asked for, as in ZEROADAM_TEST_SEEDS=5000.
SEEDS = int(os.environ.get("ZEROADAM_TEST_SEEDS", "800"))
PARTS = 4  # which run beside each other
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch logs every failing load, with tracebacks."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def training(seed: int = 0) -> dict[str, Any]:
    """The state dicts of a model and its optimizer, by name."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ZeroAdamW(net.named_parameters(), lr=1e-2 * (1 + seed), fused=False)
    for _ in range(1 + seed):
        net(torch.randn(2, 3)).square().sum().backward()
        optimizer.step()
    state = optimizer.state_dict()
    names = [name for name, _ in net.named_parameters()]
    state["param_groups"][0]["params"] = names
    state["state"] = dict(zip(names, state["state"].values(), strict=True))
    return {"model": net.state_dict(), "optim": state}


def flat(value: Any, place: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """All leaves, tensors as bytes."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, (*place, key)).items()}
    if isinstance(value, list):
        return {k: v for key, item in enumerate(value) for k, v in flat(item, (*place, key)).items()}
    if isinstance(value, torch.Tensor):
        return {place: (value.dtype, value.shape, value.detach().numpy().tobytes())}
    return {place: (type(value), value)}


def damage(file: Path, generator: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    for _ in range(generator.choice((1, 1, 1, 2, 8))):
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    file.write_bytes(raw)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.slow
def test_flipped_bits(tmp_path: Path, part: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In the metadata more often than in the data, whose checksums find nearly all of them."""
    good, bad, out = tmp_path / "good", tmp_path / "bad", tmp_path / "out.pt"
    dcp.save(training(0), checkpoint_id=good)
    wanted, before = flat(training(0)), flat(training(1))
    export(good, out)
    exported = flat(torch.load(out))
    inspect(good)
    capsys.readouterr()
    results, several_lines = {"refused": 0, "right": 0}, 0
    for seed in range(part, SEEDS, PARTS):
        generator = random.Random(seed)
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        files = sorted(bad.iterdir())
        damage(generator.choice([*files, *[bad / ".metadata"] * 3]), generator)
        state = training(1)
        for name in ("load", "inspect", "export"):
            out.unlink(missing_ok=True)
            try:
                if name == "load":
                    checkpoint.load(state, checkpoint_id=bad)
                    assert flat(state) == wanted, seed
                elif name == "inspect":
                    inspect(bad)
                else:
                    export(bad, out)
                    assert flat(torch.load(out)) == exported, seed
                results["right"] += 1
            except (ValueError, RuntimeError) as error:
                results["refused"] += 1
                several_lines += "\n" in str(error)
                assert name != "load" or flat(state) == before, (seed, name)
                assert name != "export" or not out.exists(), (seed, name)
    assert several_lines == 0
    assert results["refused"] > SEEDS / PARTS
    assert results["right"] > SEEDS / PARTS / 10


def edited(folder: Path, edit: Any) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def without_storage(metadata: Any) -> None:
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == "model.0.weight")]


def shorter(metadata: Any) -> None:
    metadata.state_dict_metadata["model.0.weight"].chunks[0].sizes = torch.Size([3, 3])


def twice(metadata: Any) -> None:
    metadata.state_dict_metadata["model.0.weight"].chunks *= 2


def without_description(metadata: Any) -> None:
    del metadata.state_dict_metadata["optim.state.0.weight.exp_avg"]


def other_dtype(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["model.0.weight"]
    entry.properties = type(entry.properties)(dtype=torch.int32)


def other_content(metadata: Any) -> None:
    stored = {index.fqn: index for index in metadata.storage_data}
    metadata.storage_data[stored["model.0.weight"]] = metadata.storage_data[stored["model.1.weight"]]


def other_place(metadata: Any) -> None:
    metadata.planner_data["optim.param_groups.0.maximize"] = ("optim", "param_groups", 0, "minimize")


EDITS = {
    without_storage: "model.0.weight is not stored",
    shorter: "the pieces of model.0.weight do not make up the whole",
    twice: "the pieces of model.0.weight do not make up the whole",
    without_description: r"optim.state.0.weight.exp_avg is not described",
    other_dtype: "in model.0.weight: it is not the piece of a tensor that the metadata describe",
    other_content: "two entries are at byte",
    other_place: r"optim.param_groups.0.maximize is said to be at \('optim', 'param_groups', 0, 'minimize'\)",
}


@pytest.mark.parametrize("edit", EDITS)
def test_metadata_that_do_not_fit_the_files(tmp_path: Path, edit: Any) -> None:
    folder = tmp_path / "checkpoint"
    dcp.save(training(0), checkpoint_id=folder)
    edited(folder, edit)
    state = training(1)
    for way in (lambda: checkpoint.load(state, checkpoint_id=folder), lambda: export(folder, tmp_path / "out.pt")):
        with pytest.raises(ValueError, match=EDITS[edit]):
            way()
    assert flat(state) == flat(training(1))
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("size", "boxes", "whole"),
    [
        ((), [((), ())], True),
        ((), [], False),
        ((0, 3), [], True),
        ((4, 3), [((0, 0), (4, 3))], True),
        ((4, 3), [((0, 0), (2, 3)), ((2, 0), (2, 3))], True),
        ((4, 3), [((0, 0), (2, 3)), ((1, 0), (2, 3))], False),  # as many elements, but some twice
        ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2))], True),
        ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 1), (2, 2))], False),
        ((4, 4), [((0, 0), (4, 4)), ((0, 0), (4, 4))], False),
        ((4, 4), [((0, 0), (2, 4)), ((4, 0), (2, 4))], False),  # beyond the end
        ((4, 4), [((0,), (4,))], False),
    ],
)
def test_pieces_make_up_a_whole(size: Any, boxes: Any, whole: bool) -> None:
    chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(sizes)) for start, sizes in boxes]
    assert _make_up(torch.Size(size), chunks) == whole
