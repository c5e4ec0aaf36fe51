"""What each rank writes of a checkpoint, copied while the training waits, and written while it goes on."""

import dataclasses
import io
import secrets
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from zeroadam._compat import flatten_state_dict
from zeroadam.state.state_dict import local_of
from zeroadam.untrusted import load_object

COPYING = 2  # threads
SIMPLE = (int, float, str, bytes, type(None))  # and bool, which is an int


@dataclasses.dataclass
class Staged:
    """This rank's part of a state dict, as it was at one step."""

    described: dict[str, Any]  # the tensors and objects themselves, of which only shapes and dtypes are used
    mappings: dict[str, Any]  # where each entry of the state dict, also those that other ranks write, is in it
    values: dict[str, Any]  # what is written: tensors, and objects as bytes


class Staging:
    """Makes a `Staged` of every state dict that is to be saved, in the same memory each time.

    Of tensors that are on all ranks alike each rank writes some, so that all write as much. What else is the same on
    all of them, or is not but should be, the first rank writes.

    Args:
        copies: whether to copy tensors, to the CPU. If not they must stay as they are until they are written.
    """

    def __init__(self, rank: int, world_size: int, copies: bool) -> None:
        self.rank, self.world_size, self.copies = rank, world_size, copies
        self.memory: dict[str, Tensor] = {}

    def stage(self, state_dict: dict[str, Any], shared: Collection[int], of_rank: Collection[str]) -> Staged:
        """See `Staged`.

        shared: addresses of tensors that are the same on all ranks. of_rank: names of entries that each rank has of
            its own.

        Raises:
            ValueError: an object could not be loaded again without running code.
        """
        flat, mappings = flatten_state_dict(state_dict)
        is_shared = {
            name: value.nbytes
            for name, value in flat.items()
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.data_ptr() in shared
        }
        writers = share_out(is_shared, self.world_size)
        described = {
            name: value
            for name, value in flat.items()
            if isinstance(value, DTensor) or name.split(".")[0] in of_rank or writers.get(name, 0) == self.rank
        }
        values = {
            name: local_of(value).detach() if isinstance(value, Tensor) else _as_bytes(value, name)
            for name, value in described.items()
        }
        tensors = {name: value for name, value in values.items() if self.copies and isinstance(value, Tensor)}
        with ThreadPoolExecutor(COPYING) as threads:  # where a core is free, memory is copied faster
            used = dict(zip(tensors, threads.map(self._copied, *zip(*tensors.items(), strict=True)), strict=True))
        values |= used
        for device in {value.device for value in described.values() if isinstance(value, Tensor) and not value.is_cpu}:
            torch.accelerator.synchronize(device)
        self.memory = used
        return Staged(described, mappings, values)

    def _copied(self, name: str, value: Tensor) -> Tensor:
        into = self.memory.get(name)
        if into is None or into.shape != value.shape or into.dtype != value.dtype:
            into = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return into.copy_(value, non_blocking=True)


def share_out(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes each, the largest first to whoever has least: the same on every rank."""
    writers, loads = {}, [0] * world_size
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        writers[name] = loads.index(min(loads))
        loads[writers[name]] += sizes[name]
    return writers


def _as_bytes(value: Any, name: str) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    if not isinstance(value, SIMPLE):
        stream.seek(0)
        load_object(stream, f"the entry {name}")  # or nobody could load it again
    return stream.getvalue()


class ZeroadamPlanner(dcp.DefaultSavePlanner):
    """`torch.distributed.checkpoint.DefaultSavePlanner` of what has been staged. torch keeps plans by its name."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(enable_plan_caching=True)
        self.staged = staged

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.mappings = self.staged.mappings

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        value = self.staged.values[write_item.index.fqn]
        return io.BytesIO(value) if isinstance(value, bytes) else value


@dataclasses.dataclass
class Prefix:
    """Of the names of a rank's files, as torch's writer wants it."""

    prefix: str


class Writer(dcp.FileSystemWriter):
    """`torch.distributed.checkpoint.FileSystemWriter` whose files have names of their own in each checkpoint.

    The metadata name them, so that files of two checkpoints cannot be mixed by mistake.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self.prefix = Prefix(f"__{rank}_{secrets.token_hex(8)}_")

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        return super().write_data(dataclasses.replace(plan, storage_data=self.prefix), planner)
