"""Programs of the tests in processes forked from a server that has imported torch, which takes seconds each time."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from agent import run_forked
from patience import at_most

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("hypothesis", "pytest", "torch._dynamo", "torch.distributed.optim", "torch.distributed.tensor"),
        *("torch.distributed.checkpoint.state_dict", "torch.distributed.run", "zeroadam.checkpoint"),
        *("zeroadam.plain_file", "zeroadam.cli.checkpoint_commands"),
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


def torchrun() -> None:
    """As `python -m torch.distributed.run` with the arguments of sys.argv, but that workers are forked as well."""
    run_forked(sys.argv[1:])
