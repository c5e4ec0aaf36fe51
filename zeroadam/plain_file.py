"""`save`: one plain file of everything, with the whole state of optimizers that are sharded."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zeroadam.optimizer import ZeroAdam
from zeroadam.state.agreement import Manifest, check_ranks_agree, joined_group


def save(obj: Any, file: str | os.PathLike[str], to: int = 0) -> None:
    """`torch.save` of an object in which ZeroAdams stand for their whole state dicts. A collective.

    `zeroadam.save({"model": model.state_dict(), "optimizer": optimizer, "step": step}, "last.pt")`, on all ranks. The
    file is that of a script with `torch.optim.AdamW`, and is loaded likewise: `optimizer.load_state_dict(...)` on all
    ranks. It is written beside the one of this name, which it replaces when it is complete.

    Args:
        obj: what `torch.save` takes, with optimizers in it, inside of any dicts, lists and tuples. Only that of rank
            `to` is written, but for the state of the others.
        to: the rank in the process group, which needs memory for the whole state on the CPU.

    Raises:
        what `torch.save` raises: on rank `to`, and a RuntimeError that names it on the others. The old file is there.
        see `ZeroAdam.consolidate_state_dict`.
    """
    optimizers = {id(optimizer): optimizer for optimizer in _optimizers_in(obj)}
    group = joined_group(next((optimizer.process_group for optimizer in optimizers.values()), None))
    for optimizer in optimizers.values():
        optimizer.consolidate_state_dict(to)

    def write() -> Manifest:
        if group.rank() == to:
            write_beside(_with_state_dicts(obj), Path(file))
        return {}

    try:
        check_ranks_agree(group, write)
    finally:
        for optimizer in optimizers.values():
            optimizer._consolidated = None


def write_beside(obj: Any, file: Path) -> None:
    """`torch.save` to another file in the same folder, which is then renamed."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            torch.save(obj, stream)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _optimizers_in(obj: Any) -> Iterator[ZeroAdam]:
    if isinstance(obj, ZeroAdam):
        yield obj
    elif isinstance(obj, (dict, list, tuple)):
        for value in obj.values() if isinstance(obj, dict) else obj:
            yield from _optimizers_in(value)


def _with_state_dicts(obj: Any) -> Any:
    """The same with plain dicts, lists and tuples where optimizers were inside."""
    if isinstance(obj, ZeroAdam):
        return obj.state_dict()
    if not any(True for _ in _optimizers_in(obj)):
        return obj
    if isinstance(obj, dict):
        return {key: _with_state_dicts(value) for key, value in obj.items()}
    values = [_with_state_dicts(value) for value in obj]
    return tuple(values) if isinstance(obj, tuple) else values
