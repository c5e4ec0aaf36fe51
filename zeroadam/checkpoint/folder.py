"""A folder of checkpoints: step-00000100, step-00000200, ..., and what is not one yet, or not any more."""

import os
import shutil
import warnings
from itertools import count
from pathlib import Path


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Those of the whole checkpoints, the newest first."""
    numbers = [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted((step for step in numbers if path_of(folder, step).is_dir()), reverse=True)


def clear(folder: Path) -> None:
    """Remove what runs that have ended were writing or removing."""
    for left_over in folder.glob("step-*.tmp"):
        shutil.rmtree(left_over)


def complete(partial: Path, path: Path) -> None:
    """Give a checkpoint its name, so that it stays whatever becomes of the machine."""
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """A whole checkpoint, of which no part must pass for one meanwhile."""
    shutil.rmtree(path.rename(path.with_suffix(".tmp")))


def set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints after a step: they are damaged, or of another course of the training."""
    for path in [path_of(folder, other) for other in steps_in(folder) if other > step]:
        aside = next(new for n in count() if not (new := path.with_suffix(f".set-aside-{n}")).exists())
        path.rename(aside)
        warnings.warn(f"{path} is damaged or of another course of the training: now {aside.name}", stacklevel=4)


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
