"""`Manager`: checkpoints of a training that are written while it goes on, and from which it resumes."""

import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from zeroadam.checkpoint.folder import clear, complete, path_of, remove, set_aside, steps_in
from zeroadam.checkpoint.loading import load
from zeroadam.checkpoint.lock import Lock, is_seen
from zeroadam.checkpoint.metadata import read_metadata
from zeroadam.checkpoint.objects import Objects
from zeroadam.checkpoint.ranks import Ranks
from zeroadam.checkpoint.writing import Staged, Staging, Writer, ZeroadamPlanner
from zeroadam.state.agreement import Manifest
from zeroadam.untrusted import one_kind_of_error


class Manager:
    """Folders step-00000100, step-00000200, ... of torch.distributed.checkpoint, and everything around them.

    Saving copies this rank's part and returns; a thread writes it meanwhile. A folder gets its name when it is
    complete, so that a run which ends at any moment leaves whole ones. One that cannot be written, as on a full disk,
    is a warning. Constructor and methods are collectives of all ranks, and raise on every rank; without torchrun there
    is one.

    Each rank copies and writes its shards, 1/W of the parameters and of what else is the same on all ranks and belongs
    to a model or an optimizer; the first rank writes all else. Also each rank's state of torch's random numbers.

    Args:
        folder: shared by all hosts, made if it is not there. None: only to load from a path.
        keep: how many of the newest stay; None for all.
        in_background: False to return from `save` when all is written. That needs no memory for copies but for one
            tensor at a time, if it is on a GPU.
        per_rank: objects that have another state on each rank, such as a loader of data; see `objects`.
        objects: by their names in the checkpoint: models, optimizers, and what else has `load_state_dict()`.

    Raises:
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
        self.keep, self.in_background, self._ranks = keep, in_background, Ranks()
        self.rank = self._ranks.rank
        self.folder = None if folder is None else Path(folder).absolute()
        self.error: str | None = None  # why the last checkpoint is not there, on every rank
        self.step = self._before = 0  # of the last one that was saved or loaded, and of the one before
        self._ours = False  # whether all checkpoints of the folder up to that one are of this course of the training
        self._writing: tuple[int, Future[None]] | None = None
        self._staging = Staging(self.rank, self._ranks.world_size, copies=in_background)
        self._planner = type(f"ZeroadamPlanner-{secrets.token_hex(8)}", (ZeroadamPlanner,), {})  # plans of its own
        self._executor = ThreadPoolExecutor(1, "zeroadam.checkpoint")
        self._lock: Lock | None = None

        def check() -> Manifest:
            self._objects = Objects(self.rank, objects, per_rank or {})
            if keep is not None and keep < 1:
                raise ValueError(f"keep is how many checkpoints stay, at least 1, or None, not {keep}")
            return {"the folder": str(folder), "the objects": str([*self._objects.objects, *self._objects.per_rank])}

        self._ranks.agree(check)
        if self.folder is not None:
            self._open(self.folder)

    def save(self, step: int) -> None:
        """Save what all objects hold now, as the checkpoint of a step. Waits for the one before, if that is not done.

        Objects may change as soon as it returns.

        Raises:
            ValueError: there is no folder; a step that is not behind the last one; an object that could not be loaded
                again without running code.
            RuntimeError: ranks that disagree on what they save.
        """
        self.finish()
        staged: Staged | None = None

        def stage() -> Manifest:
            nonlocal staged, step
            if not hasattr(step, "__index__"):
                raise ValueError(f"a step is a whole number, not {step!r}")
            step = int(step)  # of numpy's as well
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

        self._ranks.agree(stage)
        assert staged is not None

        def own() -> Manifest:
            if self.folder is not None and self._lock is not None:  # the first rank
                self._lock = self._lock.ensure()
                set_aside(self.folder, self.step if self._ours else -1)
            return {}

        self._ranks.agree(own)
        self._before, self.step, self._ours = self.step, step, True
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
        failures = self._ranks.gathered(failure and (str(failure).strip() or type(failure).__name__))
        reason = next(filter(None, failures), None)
        self.error = None if reason is None else f"no checkpoint of step {step}: {reason}"
        if self.error is not None:
            self.step = self._before  # it may be tried again
            if self.rank == 0:
                warnings.warn(self.error, stacklevel=2)

    def steps(self) -> list[int]:
        """Those of which there are checkpoints, the newest first. Waits for the one that is being written."""
        self.finish()
        return list(self._ranks.gathered(steps_in(self.folder) if self.folder else [])[0])

    def load(self, source: int | str | os.PathLike[str] | None = None) -> int:
        """Take over a checkpoint: the newest that can be read, and that fits.

        Newer ones that are damaged are passed over with a warning, and renamed to *.set-aside-0 with the next `save`,
        as are all that are there if nothing was loaded.

        Args:
            source: the step of another one, or a path to a folder that torch.distributed.checkpoint has written.

        Returns:
            its step; that is 0 if there is none yet, and for a path. All objects are as they were then.

        Raises:
            ValueError: or a RuntimeError: there are checkpoints, and none of them can be loaded. All objects are as
                they were, unless one of them has refused its state, which the message tells.
        """
        self.finish()
        failures: list[Exception] = []
        self._ranks.agree(lambda: {"what to load": str(source)})
        if source is None or not isinstance(source, (str, os.PathLike)):
            steps = self.steps()
            if source is not None and source not in steps:
                raise ValueError(f"{self.folder} has no checkpoint of step {source}, but of {steps or 'none'}")
            folder = self.folder or Path()
            paths = [(step, path_of(folder, step)) for step in (steps if source is None else [source])]
        else:
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

            self._ranks.agree(apply)
            self.step, self._ours = step, not isinstance(source, (str, os.PathLike))
            return step
        if failures:
            raise failures[0]
        return 0

    def close(self) -> None:
        """Wait for the last checkpoint, and let another run have the folder.

        Raises:
            RuntimeError: the last one could not be written.
        """
        if self._ranks.closed:
            return
        self.finish()
        self._executor.shutdown()
        if self._lock is not None:
            self._lock.release()
        self._ranks.close()
        if self.error is not None:
            raise RuntimeError(self.error)

    def __enter__(self) -> "Manager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _open(self, folder: Path) -> None:
        token = self._ranks.gathered(secrets.token_hex(8))[0]

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
            self._ranks.agree(lock)
            self._ranks.agree(see)
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
                process_group=self._ranks.process_group,
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

        self._ranks.agree(prepare)
        load(state, checkpoint_id=path, process_group=self._ranks.process_group)
        return state
