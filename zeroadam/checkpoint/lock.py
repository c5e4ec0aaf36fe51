"""One run at a time in a folder of checkpoints."""

import contextlib
import errno
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = ".lock"
WAIT_SECONDS = 10.0  # for a process that has been killed, and for other hosts to see the file
_held: set[int] = set()  # files


class Lock:
    """A file that this process has locked, until `release` or its end, however it ends.

    The system's lock on it holds on one host, and on several through NFS.

    Raises:
        RuntimeError: another process has it, or this one has already.
    """

    def __init__(self, folder: Path, token: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _wait_for(file, folder)
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "token": token}).encode())
        except BaseException:
            os.close(file)
            raise
        _held.add(file)
        self.folder, self.token, self.file = folder, token, file
        self.release = weakref.finalize(self, _release, file)

    def ensure(self) -> "Lock":
        """This one; another, where the folder was removed and made again meanwhile."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.file), (self.folder / NAME).stat()):
                return self
        self.release()
        return Lock(self.folder, self.token)


def is_seen(folder: Path, token: str) -> bool:
    """Whether the file is there as the process that holds the lock has written it, at once or a little later."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads((folder / NAME).read_text())["token"] == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _wait_for(file: int, folder: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
                return
        else:
            return
        os.lseek(file, 0, os.SEEK_SET)
        mine = {"process": os.getpid(), "host": socket.gethostname()}
        try:
            holder = json.loads(os.read(file, 4096))
            who = f"process {holder['process']} of host {holder['host']}"
        except (ValueError, KeyError, TypeError):
            holder, who = {}, "another process"
        if mine.items() <= holder.items():
            raise RuntimeError(f"another Manager of this process writes checkpoints to {folder}: close() it first")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{who} writes checkpoints to {folder}: end it, or give this run a folder of its own")
        time.sleep(0.1)


def _lock(file: int) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        raise OSError(errno.ENOLCK, "no locks on this system") from None
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf's would go as soon as anybody here reads the file


def _release(file: int) -> None:
    if file in _held:
        _held.discard(file)
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_UN)  # also of a process that was forked and has not come to close it
        os.close(file)


def _leave_to_the_parent() -> None:
    """In a forked process, such as a loader of data, which would hold the lock when this one has ended."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
