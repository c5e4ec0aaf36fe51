"""A torchrun that is killed, or whose workers are, by launch/soak.py and the tests. On Linux."""

import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TextIO

from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

# What a script leaves behind, kept to the end as it is in a program of its own: where DDP and its process group are
# collected as garbage, torch 2.13 joins gloo's threads with the interpreter's lock held, which they may wait for.
_left: list[dict[str, Any]] = []


def run_forked(options: Sequence[str]) -> None:
    """As torchrun with these options, but that workers are forked, with the modules that this process has imported."""
    args = torchrun.parse_args(options)
    if args.standalone:  # what torchrun makes of it
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(os.getpid())
    config, _, command = torchrun.config_from_args(args)
    config.start_method = "fork"
    script, *arguments = command[1:]  # behind python's -u
    elastic_launch(config, _run_script)(script, arguments)


def _run_script(script: str, arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a program of its own has it
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        _left.append(runpy.run_path(script, run_name="__main__"))
    except Exception:  # which torch would only write to a file
        traceback.print_exc()
        sys.exit(1)


class Forked(ForkProcess):
    """torchrun by `run_forked`, in a process forked from this one.

    It has what the program needs of subprocess.Popen.
    """

    def __init__(self, options: Sequence[str], output: TextIO, env: dict[str, str], preexec_fn: Callable[[], Any]):
        super().__init__()
        self.options, self.output, self.env, self.prepare = options, output, env, preexec_fn
        self.start()

    def run(self) -> None:
        os.dup2(self.output.fileno(), 1)
        os.dup2(self.output.fileno(), 2)
        os.environ.update(self.env)
        tempfile.tempdir = None  # or it would be that of the program
        self.prepare()
        run_forked(self.options)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("torchrun", timeout or 0)
        return self.exitcode


class Agent:
    """A torchrun that is killed, or whose workers are; ended with its workers whatever happens.

    Args:
        log: for what it and its workers say.
        file_blocks: the largest file that they may write, in KiB, which stands in for a full disk.
    """

    forks = False  # from this process, or each start imports torch anew

    def __init__(self, log: Path, *options: str, file_blocks: int | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", *options]

        def limit() -> None:
            if file_blocks is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * file_blocks,) * 2)

        variables = {**os.environ, "TMPDIR": str(log.parent), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.process: Forked | subprocess.Popen[bytes]
        with log.open("w") as output:
            if self.forks:
                self.process = Forked(options, output, variables, limit)
            else:
                self.process = subprocess.Popen(command, stdout=output, stderr=output, env=variables, preexec_fn=limit)

    def workers(self) -> list[int]:
        return workers_of(self.process.pid)

    def wait_for(self, condition: Callable[[], Any], seconds: float = 300) -> None:
        """Raises AssertionError with the end of the log if it does not come true."""
        deadline = time.monotonic() + seconds
        while True:
            has_ended = self.process.poll() is not None  # asked for first, as both may come true in between
            if condition():
                return
            assert not has_ended, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.002)

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                for pid in (*self.workers(), self.process.pid):
                    kill(pid)
                self.process.wait()


def workers_of(pid: int | None) -> list[int]:
    """The children of a torchrun that run; of one that has ended the command line is empty."""
    running = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/cmdline").read_text():
                    running.append(int(child))
    return running


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    assert pid, "it has been started"
    with suppress(ProcessLookupError):
        os.kill(pid, number)
