"""Programs of the tests in processes forked from a server that has imported torch, which takes seconds each time."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from agent import run_forked
from hosts import Hosts
from node import torchrun_options
from patience import at_most

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("hypothesis", "pytest", "torch._dynamo", "torch.distributed.optim", "torch.distributed.tensor"),
        *("torch.distributed.checkpoint.state_dict", "torch.distributed.run", "zeroadam.checkpoint"),
        *("zeroadam.plain_file", "zeroadam.cli.checkpoint_commands", "bitsandbytes.functional"),
        # What torch imports at the first use of a profiler's mark and of a checkpoint; older ones have not all of it.
        *("torch.profiler._cupti_monitor", "torch.distributed.checkpoint._fsspec_filesystem"),
    ]
)


def run(
    main: Callable[[], None],
    arguments: Sequence[str],
    seconds: float,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call `main()` with `sys.argv` and what it says caught, as subprocess.run does for a program."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        given = (main, list(arguments), str(cwd or Path.cwd()), dict(env or os.environ), str(out), str(err))
        process = CONTEXT.Process(target=_child, args=given)
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.terminate()  # torchrun ends its workers, which are sessions of their own
            process.join(at_most(35))
            process.kill()
            pytest.fail(f"no end after {seconds} s:\n{out.read_text()}\n{err.read_text()}")
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read_text(), err.read_text())


def _child(main: Callable[[], None], arguments: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for file, target in ((out, 1), (err, 2)):
        descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, target)
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None
    sys.argv = arguments
    main()


class Node:
    """launch/node.py on a host, with workers that are forked as well; what tests need of subprocess.Popen.

    Args:
        log: for what it and its workers say, behind what is there.
        arguments: of launch/node.py.
    """

    def __init__(self, hosts: Hosts, index: int, log: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        env = {**env, **hosts.variables(index)}
        given = (_node, ["node.py", *arguments], str(Path.cwd()), env, str(log), str(log))
        self.process = CONTEXT.Process(target=_child_on_host, args=(hosts.names[index], *given))
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            pytest.fail(f"no end after {timeout} s")
        return self.process.exitcode


def _child_on_host(host: str, *given: Any) -> None:
    with Path(f"/run/netns/{host}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns to {host}")
    os.setsid()
    _child(*given)


def _node() -> None:
    run_forked(torchrun_options(sys.argv[1:]))


def torchrun(imports: str) -> None:
    """As `python -m torch.distributed.run` with the arguments of sys.argv, but that workers are forked as well."""
    exec(imports, {})
    run_forked(sys.argv[1:])
