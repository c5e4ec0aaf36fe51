"""`zeroadam.checkpoint.load_file`: a plain file is loaded exactly, or refused in one line."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from state_checks import equal

from zeroadam.checkpoint import load_file

STATE = {"weights": torch.arange(60.0).view(3, 20), "state": {0: {"step": torch.tensor(3.0)}}, "lr": 0.1, "text": "x"}


def test_it_is_what_was_saved(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "file.pt")
    for mmap in (False, True):
        assert equal(load_file(tmp_path / "file.pt", mmap=mmap), STATE)


def test_damage(tmp_path: Path) -> None:
    """Flipped bits in the data, the pickle and the zip's own headers, and files that are cut short."""
    file = tmp_path / "file.pt"
    torch.save(STATE, file)
    good = file.read_bytes()
    messages = []
    for seed in range(1500):
        generator = random.Random(seed)
        raw = bytearray(good)
        for _ in range(generator.choice((1, 1, 2, 8))):
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        file.write_bytes(raw[: generator.randrange(len(raw))] if generator.random() < 0.1 else raw)
        try:
            found: Any = load_file(file)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert equal(found, STATE), seed
    assert 200 < len(messages) < 1500
    assert not any("\n" in message for message in messages)


def test_refusals(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "path.pt")
    with pytest.raises(ValueError, match=r"path.pt holds a pathlib.*add_safe_globals"):
        load_file(tmp_path / "path.pt")
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "nowhere.pt")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.pt is damaged: it is no zip file"):
        load_file(tmp_path / "old.pt")
