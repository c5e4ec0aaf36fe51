"""`Manager`: checkpoints of a training that are written while it goes on, and from which it resumes."""

import os
import secrets
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from zeroadam.checkpoint.folder import clear, complete, path_of, remove, set_aside, steps_in
from zeroadam.checkpoint.loading import load
from zeroadam.checkpoint.lock import Lock, is_seen
from zeroadam.checkpoint.metadata import read_metadata
from zeroadam.checkpoint.objects import Objects
from zeroadam.checkpoint.writing import Staged, Staging, Writer, ZeroadamPlanner
from zeroadam.state.agreement import Manifest, check_ranks_agree, joined_group
from zeroadam.transport.alone import OneProcess
from zeroadam.untrusted import one_kind_of_error

# How long a rank may write while others wait for it. One that ends is noticed at once.
TIMEOUT = timedelta(hours=2)


class Manager:
    """Folders step-00000100, step-00000200, ... of torch.distributed.checkpoint, and everything around them.

    Saving copies this rank's part and returns; a thread writes it meanwhile. A folder gets its name when it is
    complete, so that a run which ends at any moment leaves whole ones. One that cannot be written, as on a full disk,
    is a warning. Constructor and methods are collectives of all ranks; without torchrun there is one.

    Each rank copies and writes its shards, 1/W of the parameters and of what else is the same on all ranks and belongs
    to a model or an optimizer; the first rank writes all else. Also each rank's state of torch's random numbers.

    Args:
        folder: shared by all hosts, made if it is not there. None: only to load from a path.
        keep: how many of the newest stay; None for all.
        in_background: False to return from `save` when all is written. That needs no memory for copies but for one
            tensor at a time, if it is on a GPU.
        per_rank: objects that have another state on each rank, such as a loader of data; see `objects`.
        objects: by their names in the checkpoint: models, optimizers, and what else has `load_state_dict()`.

    Raises, on every rank:
        ValueError: an object has no state_dict; an optimizer holds parameters of no model that is given; a folder that
            not all ranks see.
        RuntimeError: another run writes to the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        *,
        keep: int | None = 2,
        in_background: bool = True,
        per_rank: Mapping[str, Any] | None = None,
        **objects: Any,
    ) -> None:
        group, self.keep, self.in_background = joined_group(None), keep, in_background
        self.rank, self.world_size, alone = group.rank(), group.size(), isinstance(group, OneProcess)
        # Apart from what the training sends meanwhile.
        self.group = group if alone else dist.new_group(backend="gloo", timeout=TIMEOUT)
        if alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self.folder = None if folder is None else Path(folder)
        self.error: str | None = None  # why the last checkpoint is not there, on every rank
        self.step = 0  # of the last one that was saved or loaded
        self._ours = False  # whether all checkpoints of the folder up to that one are of this course of the training
        self._writing: tuple[int, Future[None]] | None = None
        self._staging = Staging(self.rank, self.world_size, copies=in_background)
        self._planner = type(f"ZeroadamPlanner-{secrets.token_hex(8)}", (ZeroadamPlanner,), {})  # plans of its own
        self._executor = ThreadPoolExecutor(1, "zeroadam.checkpoint")
        self._lock: Lock | None = None

        def check() -> Manifest:
            self._objects = Objects(self.rank, objects, per_rank or {})
            if keep is not None and keep < 1:
                raise ValueError(f"keep is how many checkpoints stay, at least 1, or None, not {keep}")
            return {"the folder": str(folder), "the objects": str([*self._objects.objects, *self._objects.per_rank])}

        check_ranks_agree(self.group, check)
        if self.folder is not None:
            self._open(self.folder)

    def save(self, step: int) -> None:
        """Save what all objects hold now, as the checkpoint of a step. Waits for the one before, if that is not done.

        Objects may change as soon as it returns.

        Raises, on every rank:
            ValueError: there is no folder; a step that is not behind the last one; an object that could not be loaded
                again without running code.
            RuntimeError: ranks that disagree on what they save.
        """
        self.finish()
        staged: Staged | None = None

        def stage() -> Manifest:
            nonlocal staged
            if self.folder is None:
                raise ValueError("this Manager has no folder to save to: give it one")
            if step <= self.step and self._ours:
                raise ValueError(f"step {step} is not behind step {self.step}, which was saved or loaded last")
            if step < 0:
                raise ValueError(f"there is no step {step}")
            state = self._objects.state_dict()
            staged = self._staging.stage(state, self._objects.shared(), self._objects.of_rank)
            names = sorted(name for name in staged.mappings if name.split(".")[0] in self._objects.objects)
            return {"the step": str(step), "what is saved": f"{len(names)} entries, {crc32(repr(names).encode()):x}"}

        check_ranks_agree(self.group, stage)
        assert staged is not None

        def own() -> Manifest:
            if self.rank == 0 and self.folder is not None:
                set_aside(self.folder, self.step if self._ours else -1)
            return {}

        check_ranks_agree(self.group, own)
        self.step, self._ours = step, True
        future: Future[None] = Future()
        self._writing = step, future
        if self.in_background:
            self._executor.submit(self._write, step, staged, future)
        else:
            self._write(step, staged, future)
            self.finish()

    def is_writing(self) -> bool:
        """On this rank. Not a collective."""
        return self._writing is not None and not self._writing[1].done()

    def finish(self) -> None:
        """Wait until the last checkpoint is there; warn, and set `error` on every rank, if it could not be written."""
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        failure = future.exception()
        failures = self._gathered(failure and (str(failure).strip() or type(failure).__name__))
        self.error = next(filter(None, failures), None)
        if self.error is not None and self.rank == 0:
            warnings.warn(f"no checkpoint of step {step}: {self.error}", stacklevel=2)

    def steps(self) -> list[int]:
        """Those of which there are checkpoints, the newest first. Waits for the one that is being written."""
        self.finish()
        return list(self._gathered(steps_in(self.folder) if self.folder else [])[0])

    def load(self, source: int | str | os.PathLike[str] | None = None) -> int:
        """Take over a checkpoint: the newest that can be read, and that fits.

        Newer ones that are damaged are passed over with a warning, and renamed to *.set-aside-0 with the next `save`,
        as are all that are there if nothing was loaded.

        Args:
            source: the step of another one, or a path to a folder that torch.distributed.checkpoint has written.

        Returns:
            its step; that is 0 if there is none yet, and for a path. All objects are as they were then.

        Raises, on every rank:
            ValueError or RuntimeError: there are checkpoints, and none of them can be loaded. All objects are as they
                were, unless one of them has refused its state, which the message tells.
        """
        failures: list[Exception] = []
        if source is None or isinstance(source, int):
            steps = self.steps()
            if source is not None and source not in steps:
                raise ValueError(f"{self.folder} has no checkpoint of step {source}, but of {steps or 'none'}")
            folder = self.folder or Path()
            paths = [(step, path_of(folder, step)) for step in (steps if source is None else [source])]
        else:
            self.finish()
            paths = [(0, Path(source))]
        for step, path in paths:
            try:
                state = self._read(path)
            except (ValueError, RuntimeError) as error:
                failures.append(error)
                continue
            if self.rank == 0:
                for failure in failures:
                    warnings.warn(f"a checkpoint is passed over: {failure}", stacklevel=2)

            def apply() -> Manifest:
                self._objects.load_state_dict(state, path)  # noqa: B023
                return {}

            check_ranks_agree(self.group, apply)
            self.step, self._ours = step, source is None or isinstance(source, int)
            return step
        if failures:
            raise failures[0]
        return 0

    def close(self) -> None:
        """Wait for the last checkpoint, and let another run have the folder.

        Raises, on every rank:
            RuntimeError: the last one could not be written.
        """
        self.finish()
        self._executor.shutdown()
        if self._lock is not None:
            self._lock.release()
        if not isinstance(self.group, OneProcess):
            # A thread of gloo may still need the interpreter's lock to free tensors, while the group waits for its
            # threads (pytorch#56297); and one that is left when the interpreter ends aborts the process.
            time.sleep(0.1)
            dist.destroy_process_group(self.group)
            del self.group
        if self.error is not None:
            raise RuntimeError(f"no checkpoint of step {self.step}: {self.error}")

    def __enter__(self) -> "Manager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _open(self, folder: Path) -> None:
        token = self._gathered(secrets.token_hex(8))[0]

        def lock() -> Manifest:
            if self.rank == 0:
                self._lock = Lock(folder, token)
                clear(folder)
            return {}

        def see() -> Manifest:
            if not is_seen(folder, token):
                raise ValueError(f"rank {self.rank} does not see the {folder} of rank 0: all hosts must share it")
            return {}

        try:
            check_ranks_agree(self.group, lock)
            check_ranks_agree(self.group, see)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def _write(self, step: int, staged: Staged, future: "Future[None]") -> None:
        """In the thread, on every rank."""
        assert self.folder is not None
        path = path_of(self.folder, step)
        partial = path.with_suffix(".tmp")
        try:
            dcp.save(
                staged.described,
                storage_writer=Writer(partial, self.rank),
                planner=self._planner(staged),
                process_group=None if isinstance(self.group, OneProcess) else self.group,
            )
            if self.rank == 0:
                complete(partial, path)
                try:
                    for old in steps_in(self.folder)[self.keep :] if self.keep else []:
                        remove(path_of(self.folder, old))
                except OSError as error:
                    warnings.warn(f"an old checkpoint cannot be removed: {error}", stacklevel=2)
        except BaseException as error:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            future.set_exception(first)
        else:
            future.set_result(None)

    def _read(self, path: Path) -> dict[str, Any]:
        """What a checkpoint has for all objects; the tensors of models and optimizers hold it then."""
        state: dict[str, Any] = {}

        def prepare() -> Manifest:
            with one_kind_of_error(path):
                metadata = read_metadata(path)
            state.update(self._objects.state_dict_for(metadata))
            return {}

        check_ranks_agree(self.group, prepare)
        load(state, checkpoint_id=path, process_group=None if isinstance(self.group, OneProcess) else self.group)
        return state

    def _gathered(self, value: Any) -> list[Any]:
        """That of each rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values
