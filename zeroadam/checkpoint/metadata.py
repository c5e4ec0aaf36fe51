"""What is in a checkpoint of torch.distributed.checkpoint, if its description fits its files."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from zeroadam.checkpoint.folder import path_of, steps_in
from zeroadam.untrusted import Reader, UnsafeError


def read_metadata(folder: str | os.PathLike[str]) -> Metadata:
    """What is in a checkpoint; raises ValueError if there is none in the folder or it cannot be read."""
    if not (Path(folder) / ".metadata").is_file():
        newest = newest_below(Path(folder))
        hint = f", but {newest} does, the newest below it" if newest else ": it has no file .metadata"
        raise ValueError(f"{folder} holds no checkpoint of torch.distributed.checkpoint{hint}")
    try:
        metadata = Reader(folder).read_metadata()
        _check_structure(metadata)
        ends = Counter[str]()
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for file, end in ends.items():
            if (size := (Path(folder) / file).stat().st_size) < end:
                raise ValueError(f"{file} has {size:,} bytes of at least {end:,}")
    except UnsafeError:
        raise
    except Exception as error:  # whatever a damaged pickle may lead to
        raise ValueError(f"{folder} is damaged: {error}") from None
    if metadata.planner_data is None:
        raise ValueError(f"{folder} was saved with flatten_state_dict=False, which is not supported")
    return metadata


def newest_below(folder: Path) -> Path | None:
    """Of the checkpoints in a folder that of the last step, as `Manager` names them, or else the last written."""
    if steps := [step for step in steps_in(folder) if (path_of(folder, step) / ".metadata").is_file()]:
        return path_of(folder, steps[0])
    written = {file.parent: file.stat().st_mtime for file in folder.glob("*/.metadata")}
    whole = [path for path in written if path.suffix != ".tmp" and "set-aside" not in path.suffix]
    return max(whole, key=lambda path: written[path], default=None)


def _check_structure(metadata: Metadata) -> None:
    """Raise ValueError unless all that is described is stored, and the pieces of each tensor make up the whole."""
    entries = metadata.state_dict_metadata
    if unknown := (metadata.planner_data or {}).keys() - entries.keys():
        raise ValueError(f"{min(unknown)} is not described")
    for fqn, path in (metadata.planner_data or {}).items():
        if fqn != ".".join(map(str, path)):
            raise ValueError(f"{fqn} is said to be at {path}")
    ranges = sorted((info.relative_path, info.offset, info.length) for info in metadata.storage_data.values())
    for (file, start, length), (other, next_start, _) in pairwise(ranges):
        if file == other and start + length > next_start:
            raise ValueError(f"two entries are at byte {next_start} of {file}")
    for fqn, entry in entries.items():
        indices = [MetadataIndex(fqn)]
        if isinstance(entry, TensorStorageMetadata):
            chunks = [chunk for chunk in entry.chunks if math.prod(chunk.sizes) != 0]
            indices = [MetadataIndex(fqn, chunk.offsets) for chunk in chunks]
            if not _make_up(entry.size, chunks):
                raise ValueError(f"the pieces of {fqn} do not make up the whole")
        elif not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{fqn} is described by a {type(entry).__name__}")
        if not metadata.storage_data.keys() >= set(indices):
            raise ValueError(f"{fqn} is not stored")


def _make_up(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether chunks cover a tensor of this size once."""
    if any(not len(chunk.offsets) == len(chunk.sizes) == len(size) for chunk in chunks):
        return False
    boxes = [tuple((o, o + s, n) for o, s, n in zip(c.offsets, c.sizes, size, strict=True)) for c in chunks]
    if any(not 0 <= start < end <= whole for box in boxes for start, end, whole in box):
        return False
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        return False
    # In the order of the dimension in which they differ most, a piece can overlap those right behind it only.
    axis = max(range(len(size)), key=lambda dim: len({box[dim] for box in boxes}), default=0)
    boxes.sort(key=lambda box: box[axis:])
    for at, box in enumerate(boxes):
        for other in boxes[at + 1 :]:
            if other[axis][0] >= box[axis][1]:  # as do all that follow
                break
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)):
                return False
    return True
