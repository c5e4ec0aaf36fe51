"""`load`: torch.distributed.checkpoint's, but all or nothing.

Saving needs nothing of ours: the state is made of DTensors. Loading does, as torch's `load` reads into the live
tensors: where a file turns out to be cut short, half of them are new by then; and it does not look at checksums.
"""

import io
import math
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.stateful import Stateful

from zeroadam.checkpoint.metadata import read_metadata
from zeroadam.state.agreement import Manifest, check_hyperparameters, check_ranks_agree, joined_group
from zeroadam.state.state_dict import local_of
from zeroadam.untrusted import Planner, Reader, UnsafeError, load_object, one_kind_of_error
from zeroadam.update.master import MASTERS

NOTHING = object()
# The flags of a param group on which the names in the state of its parameters depend, or what can be done with them.
LAYOUT = ("amsgrad", "differentiable")
# What the param groups of torch's Adams have, and of no other optimizer.
ADAMS = {"lr", "betas", "eps", "weight_decay", "amsgrad"}


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str],
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """`torch.distributed.checkpoint.load` that changes nothing if the checkpoint does not fit or is damaged.

    A collective. Every rank reads 1/W of the files to compare checksums, and then what it needs of them.

    Args:
        state_dict: to load into, in place; of the structure that was saved. DTensors may have been sharded otherwise.
        checkpoint_id: a folder written by torch.distributed.checkpoint's FileSystemWriter, in its default format.
        process_group: all ranks by default.

    Raises:
        ValueError: or a RuntimeError, on every rank: the folder holds no checkpoint, its files are missing, cut short
            or damaged, an entry is missing or of another shape or dtype, or a param group holds other parameters.
    """
    plain = {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state_dict.items()}
    group = joined_group(process_group)
    metadata: Metadata | None = None

    def check() -> Manifest:
        nonlocal metadata
        with one_kind_of_error(checkpoint_id):
            metadata = read_metadata(checkpoint_id)
            wanted = {fqn for fqn, path in metadata.planner_data.items() if _find(plain, path) is not NOTHING}
            check_files(checkpoint_id, metadata, wanted, part=group.rank(), parts=group.size())
            _check_param_groups(plain, checkpoint_id, metadata)
            if group.rank() == 0:
                _warn_of_two_saves(checkpoint_id, metadata)
        return {"what is in the checkpoint (do all see the same folder?)": f"{len(metadata.storage_data)} entries"}

    check_ranks_agree(group, check)
    assert metadata is not None
    read(state_dict, checkpoint_id, metadata, planner=_Strict(), process_group=process_group)


def read(state_dict: dict[str, Any], folder: str | os.PathLike[str], metadata: Metadata, **options: Any) -> None:
    """`torch.distributed.checkpoint.load`, whose own exception `except Exception` would not catch.

    metadata: as `read_metadata` gives them. options: with a planner that is a `zeroadam.untrusted.Planner`.
    """
    try:
        dcp.load(state_dict, storage_reader=Reader(folder, metadata), **options)
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items(), key=lambda failure: failure[0])
        raise RuntimeError(f"{folder} does not fit, says rank {rank}: {error}") from None


def _check_value(value: Any, index: MetadataIndex, entry: TensorStorageMetadata | BytesStorageMetadata) -> None:
    """Raise ValueError for a piece of a tensor that is not what the metadata says."""
    if isinstance(entry, TensorStorageMetadata):
        sizes = [chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset]
        if not isinstance(value, Tensor) or [value.shape] != sizes or value.dtype != entry.properties.dtype:
            raise ValueError("it is not the piece of a tensor that the metadata describe")


def check_files(
    folder: str | os.PathLike[str], metadata: Metadata, wanted: Collection[str], *, part: int = 0, parts: int = 1
) -> None:
    """Compare the checksums of every `parts`-th entry of a checkpoint, from `part` on, with what is in its files.

    wanted: the entries that are going to be loaded; objects in others are not unpickled.

    Raises:
        ValueError: a file is missing, cut short or damaged; UnsafeError: an object could run code.
    """
    for index in sorted(metadata.storage_data, key=repr)[part::parts]:
        is_tensor = isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        try:
            entry = _entry(folder, metadata, index)
            damaged = zipfile.ZipFile(entry).testzip()
            entry.seek(0)
            if is_tensor or index.fqn in wanted:  # checksums do not cover the zip headers
                _check_value(
                    load_object(entry, f"the entry {index.fqn}"), index, metadata.state_dict_metadata[index.fqn]
                )
        except UnsafeError:
            raise
        except Exception as error:  # whatever damaged headers may lead to
            raise ValueError(f"{folder} is damaged, in {index.fqn}: {error}") from None
        if damaged is not None:
            raise ValueError(f"{folder} is damaged, in {index.fqn}: its checksum is wrong")


def _entry(folder: str | os.PathLike[str], metadata: Metadata, index: MetadataIndex) -> io.BytesIO:
    """What torch.save wrote for one piece of one tensor, or for one object."""
    info = metadata.storage_data[index]
    with (Path(folder) / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        return io.BytesIO(file.read(info.length))


def _warn_of_two_saves(folder: str | os.PathLike[str], metadata: Metadata) -> None:
    """Steps that differ from file to file, and within none, most likely mean that files of another save are there.

    `Manager` gives files names of their own. Those of torch are the same in each checkpoint.
    """
    steps: dict[str, list[float]] = {}
    for index, info in metadata.storage_data.items():
        if metadata.planner_data.get(index.fqn, ())[-1:] == ("step",):
            value = load_object(_entry(folder, metadata, index), f"the entry {index.fqn}")
            steps.setdefault(info.relative_path, []).append(float(value))
    uniform = all(len(set(found)) == 1 for found in steps.values())
    if uniform and sum(map(len, steps.values())) > 2 and len({found[0] for found in steps.values()}) > 1:
        where = ", ".join(f"{found[0]:.0f} in {file}" for file, found in sorted(steps.items()))
        warnings.warn(f"{folder} has files of different steps ({where}): are they of one save?", stacklevel=2)


def _check_param_groups(state_dict: dict[str, Any], folder: str | os.PathLike[str], metadata: Metadata) -> None:
    """Raise ValueError for saved param groups that the optimizer would refuse, or that are not its own.

    The params of each must be those in the checkpoint, or they would get others' hyper-parameters.
    """
    saved: dict[tuple[Any, ...], dict[str, Any]] = {}  # by the place of each group
    for fqn, path in metadata.planner_data.items():
        if (
            path[-3:-2] == ("param_groups",)
            and isinstance(path[-2], int)
            and _find(state_dict, path[:-2]) is not NOTHING
        ):
            saved.setdefault(path[:-1], {})[path[-1]] = fqn
    for place, entries in saved.items():
        groups, index = _find(state_dict, place[:-1]), place[-1]
        if index >= len(groups):
            raise ValueError(f"{folder} has more than the {len(groups)} param groups of the optimizer")
        own = groups[index]
        group = {
            key: load_object(_entry(folder, metadata, MetadataIndex(fqn)), f"the entry {fqn}")
            for key, fqn in entries.items()
            if key in own and isinstance(metadata.state_dict_metadata[fqn], BytesStorageMetadata)
        }
        for theirs, ours in zip_longest(group.get("params", own["params"]), own["params"], fillvalue="no parameter"):
            if theirs != ours:
                raise ValueError(f"group {index} in {folder} has {theirs} where that of the optimizer has {ours}")
        for key in LAYOUT:
            if key in group and key in own and group[key] != own[key]:
                raise ValueError(
                    f"group {index} in {folder} has {key}={group[key]}, that of the optimizer {key}={own[key]}"
                )
        if own.keys() >= ADAMS:
            check_hyperparameters(group, f"group {index} in {folder}")


def _find(state_dict: dict[str, Any], path: Sequence[str | int]) -> Any:
    """What is at a place in nested dicts and lists, or NOTHING."""
    found: Any = state_dict
    try:
        for key in path:
            found = found[key if not isinstance(found, dict) or key in found else int(key)]
    except (LookupError, TypeError, ValueError):
        return NOTHING
    return found


class _Strict(Planner):
    """torch's planner looks for missing entries and other shapes; this one for other dtypes and gaps as well.

    It leaves masters out that were not saved: the optimizer makes them from the parameters then.
    """

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for fqn in self.state_dict.keys() - self.metadata.state_dict_metadata.keys():
            *place, name = self.mappings[fqn]
            if name in MASTERS and place[-2:-1] == ["state"]:
                entry: Any = self.original_state_dict
                for key in place:  # numbers of parameters are text there
                    entry = entry[key] if key in entry else entry[int(key)]
                del self.state_dict[fqn], entry[name]
        plan = super().create_local_plan()
        covered = Counter[str]()
        for item in plan.items:
            covered[item.dest_index.fqn] += math.prod(item.lengths)
        for fqn, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata[fqn]
            if not isinstance(value, Tensor) or not isinstance(saved, TensorStorageMetadata):
                continue
            if saved.properties.dtype != value.dtype:
                raise ValueError(f"{fqn} is {saved.properties.dtype} in the checkpoint, here {value.dtype}")
            numel = local_of(value).numel()
            if covered[fqn] != numel:
                raise ValueError(f"the checkpoint has {covered[fqn]} elements of the {numel} of {fqn} that are needed")
        return plan
