"""`zeroadam export` and `inspect`: a checkpoint as a plain PyTorch file, and what is in it."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from zeroadam.checkpoint.loading import check_files, read
from zeroadam.checkpoint.metadata import read_metadata
from zeroadam.plain_file import write_beside
from zeroadam.untrusted import Planner, one_kind_of_error
from zeroadam.update.master import MASTERS, convert
from zeroadam.update.rounding import dequantize_entry

# Where in nested dicts and lists an entry was: ("optim", "state", "layer.weight", "exp_avg").
Place = tuple[str | int, ...]


class Contents:
    """The optimizer and the model in a checkpoint of torch.distributed.checkpoint, found by their structure.

    Raises:
        ValueError: there is no checkpoint, not one optimizer in it, or no telling which is its model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)
        self.places: dict[str, Place] = self.metadata.planner_data
        self.optimizer = self._find_optimizer()
        depth = len(self.optimizer)
        self.groups: dict[int, dict[str, str]] = {}  # entries by index and key
        self.state: dict[str, dict[str, str]] = {}  # entries by parameter and key
        for fqn, place in self.places.items():
            if place[:depth] != self.optimizer or len(place) != depth + 3:
                continue
            kind, which, key = place[depth:]
            if kind == "param_groups":
                self.groups.setdefault(int(which), {})[str(key)] = fqn
            elif kind == "state":
                self.state.setdefault(str(which), {})[str(key)] = fqn
        values = self.read(group["params"] for group in self.groups.values())
        self.params = [[str(param) for param in values[group["params"]]] for _, group in sorted(self.groups.items())]
        self.model = self._find_model()

    def _find_optimizer(self) -> Place:
        found = {place[:-3] for place in self.places.values() if place[-3:-2] == ("param_groups",)}
        if any(str(part).startswith("param_groups.") for place in self.places.values() for part in place):
            raise ValueError(f"{self.folder} was saved with flatten_optimizer_state_dict=True, which is not supported")
        if len(found) != 1:
            names = ", ".join(sorted(_name(place) for place in found)) or "none"
            raise ValueError(f"{self.folder} should hold the state dict of one optimizer, found: {names}")
        return found.pop()

    def _find_model(self) -> dict[str, str]:
        """Entries by parameter: of the dict that has all the optimizer's parameters, or else is called model."""
        depth, dicts = len(self.optimizer), dict[Place, dict[str, str]]()
        for fqn, place in self.places.items():
            if place[:depth] != self.optimizer or place[depth : depth + 1] not in (("state",), ("param_groups",)):
                dicts.setdefault(place[:-1], {})[str(place[-1])] = fqn
        params = set(chain.from_iterable(self.params))
        if unknown := self.state.keys() - params:
            raise ValueError(f"{self.folder} has state of {unknown.pop()}, which is in no param group")
        found = [entries for entries in dicts.values() if params <= entries.keys()]
        found = found or [entries for place, entries in dicts.items() if place[-1:] == ("model",)]
        if len(found) > 1:
            raise ValueError(f"{self.folder} holds several models, and no telling which is the optimizer's")
        return found[0] if found else {}

    def read(self, wanted: Any) -> dict[str, Any]:
        """Load entries, tensors in full [d0, ...]."""
        values: dict[str, Any] = {}
        for fqn in wanted:
            entry = self.metadata.state_dict_metadata[fqn]
            if isinstance(entry, TensorStorageMetadata):
                values[fqn] = torch.empty(entry.size, dtype=entry.properties.dtype)
            else:
                values[fqn] = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            read(values, self.folder, self.metadata, planner=Planner(), no_dist=True)
        return values

    def nbytes(self, fqns: Any) -> int:
        return sum(_nbytes(self.metadata, fqn) for fqn in fqns)


def export(folder: Path, file: Path) -> None:
    """Write {"model": ..., "optimizer": ...} as torch.save does, the latter for torch.optim.AdamW.load_state_dict.

    If there are float32 copies of parameters, they are its "master", by the names of the parameters.
    """
    with one_kind_of_error(folder):
        exported = _collect(Contents(folder))
    write_beside(exported, file)
    sizes = len(exported["model"]), len(exported["optimizer"]["state"]), len(exported.get("master", ()))
    counts = '{{"model": {} entries, "optimizer": {}, "master": {}}}'.format(*sizes)
    print(f"wrote {file}, {file.stat().st_size:,} bytes: {counts}")


def _collect(contents: Contents) -> dict[str, Any]:
    """What `export` writes."""
    places = [contents.model, *contents.groups.values(), *contents.state.values()]
    wanted = [fqn for some in places for fqn in some.values()]
    check_files(contents.folder, contents.metadata, wanted)
    values = contents.read(wanted)
    ids = {param: index for index, param in enumerate(chain.from_iterable(contents.params))}
    groups = []
    for (_, entries), params in zip(sorted(contents.groups.items()), contents.params, strict=True):
        group = {key: values[fqn] for key, fqn in entries.items()}
        groups.append({**group, "params": [ids[param] for param in params]})
    model = {name: values[fqn] for name, fqn in contents.model.items()}
    state, masters = {}, {}
    for param in sorted(contents.state, key=lambda param: ids[param]):
        entry = {key: values[fqn] for key, fqn in contents.state[param].items()}
        dequantize_entry(entry)
        given = {key: entry.pop(key) for key in MASTERS if key in entry}
        state[ids[param]] = entry
        if given and param in model:
            masters[param] = convert(given, "master", model[param])
    exported: dict[str, Any] = {"model": model, "optimizer": {"state": state, "param_groups": groups}}
    if masters:
        exported["master"] = masters
    return exported


def inspect(folder: Path) -> None:
    """Print what is in a checkpoint, one parameter a line."""
    with one_kind_of_error(folder):
        lines = list(_lines(Contents(folder)))
    print("\n".join(lines))


def _lines(contents: Contents) -> Iterator[str]:
    """What `inspect` prints."""
    folder, metadata = contents.folder, contents.metadata
    files = {info.relative_path for info in metadata.storage_data.values()}
    writers = {match[1] for file in files if (match := re.match(r"__(\d+)_", file))}
    steps = contents.read(entries["step"] for entries in contents.state.values() if "step" in entries)
    rows = [["parameter", "shape", "dtype", "model, bytes", "state, bytes", "step"]]
    totals = Counter[str]()
    for name in dict.fromkeys([*chain.from_iterable(contents.params), *contents.model]):
        held = {key: fqn for key, fqn in contents.state.get(name, {}).items() if key != "step"}
        own = [contents.model[name]] if name in contents.model else []
        step = steps.get(contents.state.get(name, {}).get("step", ""))
        model_bytes, state_bytes = contents.nbytes(own), contents.nbytes(held.values())
        totals.update(model=model_bytes, state=state_bytes)
        row = [*_shape_and_dtype(metadata, [*own, *held.values()]), f"{model_bytes:,}", f"{state_bytes:,}"]
        rows.append([name, *row, "-" if step is None else f"{step:.0f}"])
    rows.append(["total", "", "", f"{totals['model']:,}", f"{totals['state']:,}", ""])
    size = sum((folder / file).stat().st_size for file in files)
    yield (f"{folder}: written by {len(writers)} ranks, {len(files)} files, {size:,} bytes")
    counts = sorted({float(step) for step in steps.values()})
    yield (
        f"optimizer: {_name(contents.optimizer)}, {len(contents.groups)} param groups, step "
        + (f"{counts[0]:.0f}" if len(counts) == 1 else f"{counts[0]:.0f} to {counts[-1]:.0f}" if counts else "0")
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left, right = zip(row[:3], widths[:3], strict=True), zip(row[3:], widths[3:], strict=True)
        yield ("  ".join([*(cell.ljust(width) for cell, width in left), *(cell.rjust(width) for cell, width in right)]))


def _shape_and_dtype(metadata: Metadata, fqns: list[str]) -> tuple[str, str]:
    for fqn in fqns:
        entry = metadata.state_dict_metadata[fqn]
        if isinstance(entry, TensorStorageMetadata):
            return " x ".join(map(str, entry.size)) or "0-d", str(entry.properties.dtype).removeprefix("torch.")
    return "-", "-"


def _nbytes(metadata: Metadata, fqn: str) -> int:
    entry = metadata.state_dict_metadata[fqn]
    return entry.size.numel() * entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 0


def _name(place: Place) -> str:
    return ".".join(map(str, place)) or "at the top"
