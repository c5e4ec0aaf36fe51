"""`save`: one plain file of everything, with the whole state of optimizers that are sharded."""

import copy
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zeroadam.optimizer import ZeroAdam
from zeroadam.state.agreement import Manifest, check_rank, check_ranks_agree, joined_group
from zeroadam.state.part import LEFT_OUT


def save(obj: Any, file: str | os.PathLike[str], to: int = 0) -> None:
    """`torch.save` of an object in which ZeroAdams stand for their whole state dicts. A collective.

    `zeroadam.save({"model": model.state_dict(), "optimizer": optimizer, "step": step}, "last.pt")`, on all ranks. The
    file is that of a script with `torch.optim.AdamW`, and is loaded likewise: `optimizer.load_state_dict(...)` on all
    ranks. It is written beside the one of this name, which it replaces when it is complete.

    Args:
        obj: what `torch.save` takes, with optimizers in it, inside of any dicts, lists and tuples, in the same places
            on all ranks. Only that of rank `to` is written, but for the state of the others.
        to: the rank in the process group, which needs memory for the whole state on the CPU. With `device_mesh` so do
            the ranks of that place in all shard groups, and that in the first one writes.

    Raises:
        Exception: what `torch.save` raises, on rank `to`, and a RuntimeError that names it on the others. The old file
            is there then.
        UserWarning: likewise, where an optimizer is inside of something else, and would be left out.
        RuntimeError: as `ZeroAdam.consolidate_state_dict`.
    """
    found = list(_optimizers_in(obj))
    optimizers = {id(optimizer): optimizer for _, optimizer in found}
    one = next(iter(optimizers.values()), None)
    group = joined_group(one.process_group if one is not None else None)
    all_ranks, first = (group, True) if one is None else (one.all_ranks, one._storage.first_replica)

    def describe() -> Manifest:
        check_rank(to, group)
        return {
            "the rank that writes": str(to),
            "where optimizers are in what is to be saved": str([path for path, _ in found]),
        }

    def device() -> torch.device:
        return next((optimizer.join_device for optimizer in optimizers.values()), torch.device("cpu"))

    check_ranks_agree(all_ranks, describe, device)

    def write() -> Manifest:
        if group.rank() == to and first:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", re.escape(LEFT_OUT))  # of one inside of something else
                write_beside(_with_state_dicts(obj), Path(file))
        return {}

    try:
        for optimizer in optimizers.values():
            optimizer.consolidate_state_dict(to)
        check_ranks_agree(all_ranks, write, device)
    finally:
        for optimizer in optimizers.values():
            optimizer._consolidated = None


def write_beside(obj: Any, file: Path) -> None:
    """`torch.save` to another file in the same folder, which is then renamed; straight to a device, as /dev/null."""
    file = Path(os.path.realpath(file))  # a link stays one
    if file.exists() and not (file.is_file() or file.is_dir()):
        torch.save(obj, file)
        return
    beside = file.with_name(f".{file.name[:50]}.{os.getpid()}.tmp")  # no longer than a name may be
    try:
        with beside.open("wb") as stream:
            torch.save(obj, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            beside.chmod(file.stat().st_mode)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _optimizers_in(obj: Any, path: str = "") -> Iterator[tuple[str, ZeroAdam]]:
    """Each with its place."""
    if isinstance(obj, ZeroAdam):
        yield path, obj
    elif isinstance(obj, (dict, list, tuple)):
        for key, value in obj.items() if isinstance(obj, dict) else enumerate(obj):
            yield from _optimizers_in(value, f"{path}[{key!r}]")


def _with_state_dicts(obj: Any) -> Any:
    """The same with state dicts in place of optimizers."""
    if isinstance(obj, ZeroAdam):
        return obj.state_dict()
    if not any(True for _ in _optimizers_in(obj)):
        return obj
    if isinstance(obj, dict):
        copied = copy.copy(obj)
        copied.update((key, _with_state_dicts(value)) for key, value in obj.items())
        return copied
    values = [_with_state_dicts(value) for value in obj]
    if isinstance(obj, list):
        same_type = copy.copy(obj)
        same_type[:] = values
        return same_type
    return type(obj)(*values) if hasattr(obj, "_fields") else type(obj)(values)
