"""Checkpoints of a training run: what has to be in one, and a folder of them that are written while it goes on."""

import copy
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from zeroadam import checkpoint


@dataclass
class Progress:
    """How far the run is: what a checkpoint holds besides model, optimizer and schedule."""

    step: int = 0
    sequences: int = 0  # that all ranks together have trained on
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (after step, loss)


class Run:
    """Everything that has to survive, for `torch.distributed.checkpoint`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        self.model, self.optimizer, self.schedule, self.progress = model, optimizer, schedule, Progress()

    def state_dict(self) -> dict[str, Any]:
        """Shards of the optimizer are this rank's, as is its random state; all else is the same on every rank."""
        model, optim = get_state_dict(self.model, self.optimizer)
        rank = f"rank {dist.get_rank()}"
        rng = {rank: torch.get_rng_state()}
        if torch.cuda.is_available():
            rng[f"{rank}, CUDA"] = torch.cuda.get_rng_state()
        train = {"schedule": self.schedule.state_dict(), "progress": [asdict(self.progress)]}
        return {"model": model, "optim": optim, "rng": rng, "train": train}

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, or raise ValueError or RuntimeError on every rank and stay as it was."""
        state = self.state_dict()
        with suppress(ValueError):  # on this rank alone; `checkpoint.load` says it on all of them
            there = checkpoint.read_metadata(folder).state_dict_metadata
            state["rng"] = {name: value for name, value in state["rng"].items() if f"rng.{name}" in there}
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.schedule.load_state_dict(state["train"]["schedule"])
        self.progress = Progress(**state["train"]["progress"][0])
        for name, value in state["rng"].items():  # a rank that is new begins with the seed's
            torch.cuda.set_rng_state(value) if name.endswith("CUDA") else torch.set_rng_state(value)

    def resume(self, folders: list[Path]) -> None:
        """Go on from the first of these checkpoints that can be read."""
        is_first_rank = dist.get_rank() == 0
        for folder in folders:
            try:
                self.load(folder)
            except (ValueError, RuntimeError) as error:
                if folder == folders[-1]:
                    raise SystemExit(f"train.py: error: cannot resume: {error}" if is_first_rank else 1) from None
                if is_first_rank:
                    print(f"train.py: going back to an older checkpoint: {error}", file=sys.stderr)
            else:
                if is_first_rank:
                    print(f"resumed after step {self.progress.step}, from {folder}", flush=True)
                return


class Copy(AsyncStager):
    """Copies a state dict to the CPU, each time into the same memory; torch's own takes 20 ms for 200 small tensors."""

    def __init__(self) -> None:
        self.last: Any = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.last = _copied(state_dict, self.last)
        return self.last

    def synchronize_staging(self) -> None:
        """The copy is complete when `stage` returns."""


def _copied(value: Any, into: Any) -> Any:
    """`value` on the CPU, with its tensors in the memory of those that `into` has in the same places."""
    if isinstance(value, dict):
        return {key: _copied(item, into.get(key) if isinstance(into, dict) else None) for key, item in value.items()}
    if isinstance(value, DTensor):
        if isinstance(into, DTensor) and into.shape == value.shape:
            _copied(value.to_local(), into.to_local())
            return into
        mesh = DeviceMesh.from_group(value.device_mesh.get_group(), "cpu")
        local = _copied(value.to_local(), None)
        return DTensor.from_local(
            local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    if isinstance(value, torch.Tensor):
        if not isinstance(into, torch.Tensor) or into.shape != value.shape:
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value)
    return copy.deepcopy(value)


class Overwriting(FileSystem):
    """Writes into a file that is there: new pages of memory-backed storage take three times as long to fill.

    What may be left of it behind the new contents does no harm, since the metadata says where everything is.
    """

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, "r+b" if mode == "wb" and Path(path).exists() else mode) as stream:
            yield stream


class Checkpoints:
    """Folders step-00000100, step-00000200, … below `folder`, which all hosts share. Every method is a collective.

    One at a time is written, in the background, to a folder beside it that is renamed at the end: whatever ends the
    processes, a name without .tmp is a whole checkpoint. The newest `keep` of them stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.spare = folder / "step-spare.tmp"  # an old one, to be overwritten by the next
        self.group = dist.new_group(backend="gloo")  # apart from what the training sends meanwhile
        self.copy = Copy()
        self.writing: Future[Any] | None = None
        self.kept = threading.Event()  # renamed or removed, on rank 0
        self.kept.set()
        self.error: BaseException | None = None  # of the last one
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob("step-*.tmp"):
                shutil.rmtree(left_over)

    def newest_first(self) -> list[Path]:
        """The whole checkpoints that there are, as rank 0 sees them."""
        found = [self._whole()]
        dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    def set_aside(self, step: int) -> None:
        """Rename checkpoints after `step`, from where the run goes on: they are damaged or of another course of it."""
        if dist.get_rank() == 0:
            for path in self._whole():
                if int(path.name.removeprefix("step-")) > step:
                    name = next(n for i in count() if not (n := path.with_suffix(f".set-aside-{i}")).exists())
                    print(f"set aside {path.rename(name)}", file=sys.stderr, flush=True)

    def save(self, step: int, state_dict: dict[str, Any]) -> None:
        """Copy the state and return; first, wait for the checkpoint before, if it is not written yet."""
        self.finish()
        self.error = None
        partial = self.folder / f"step-{step:08d}.tmp"
        if dist.get_rank() == 0 and self.spare.exists():
            self.spare.rename(partial)
        writer = dcp.FileSystemWriter(partial)
        writer.fs = Overwriting()
        self.writing = dcp.async_save(
            state_dict,
            storage_writer=writer,
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
            process_group=self.group,
            async_stager=self.copy,
        )
        if dist.get_rank() == 0:  # done there when all ranks have written
            self.kept.clear()
            self.writing.add_done_callback(lambda writing: self._keep(partial, writing))

    def finish(self) -> None:
        """Wait until the last checkpoint is there; if it could not be written, say so and go on."""
        if self.writing is None:
            return
        error = self.writing.exception()
        self.kept.wait()
        self.error, self.writing = error or self.error, None
        if self.error is not None and dist.get_rank() == 0:
            if isinstance(error, CheckpointException):
                self.error = next(iter(error.failures.values()))[0]
            print(f"\nno checkpoint: {self.error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.finish()
        if dist.get_rank() == 0:
            shutil.rmtree(self.spare, ignore_errors=True)

    def _keep(self, partial: Path, writing: "Future[Any]") -> None:
        try:
            if writing.exception() is None:
                partial.rename(partial.with_suffix(""))  # no such folder is there: see `set_aside`
                for old in self._whole()[self.keep :]:
                    shutil.rmtree(self.spare, ignore_errors=True)
                    old.rename(self.spare)
                    (self.spare / ".metadata").unlink()
            else:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            self.error = error
        finally:
            self.kept.set()

    def _whole(self) -> list[Path]:
        return sorted((path for path in self.folder.glob("step-*") if not path.suffix), reverse=True)
