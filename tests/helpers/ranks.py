"""Ranks for the tests: every call of `run_ranks` gets processes and a gloo process group of its own.

The processes are forked from a server that has imported everything once per pytest worker, so that a group of
four is there in a fraction of a second and no test can disturb the next.
"""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import late_backend
import pytest
import torch
import torch.distributed as dist
from forked import CONTEXT
from patience import at_most

# Ranks that are still busy this long after another has failed are ended.
GRACE_SECONDS = at_most(1)


# How rows travel between the ranks of a test: through shared memory, through gloo's sockets, or by the collectives of a
# backend of its own. That is gloo under another name, so that the code path of NCCL runs on CPU tensors. The last has
# its results when they are waited for, and nan before.
TRANSPORTS = ("shared memory", "sockets", "backend", "late backend")


def _one_thread_of_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    """Not the usual two, which can crash in coalesced collectives: see "free(): invalid pointer" in troubleshooting."""
    options = dist.ProcessGroupGloo._Options()
    options._threads, options._timeout = 1, timeout
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    file: str,
    answer: Connection,
    transport: str,
    hosts: str,
    group_timeout: float,
) -> None:
    torch.set_num_threads(1)
    try:
        if hosts:
            os.environ["ZEROADAM_SHARED_MEMORY"] = f"host-{hosts[rank]}"
        if transport == "sockets":
            os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
        backend = "gloo"
        if transport == "late backend":
            late_backend.install()
        if transport.endswith("backend"):
            backend = "nccllike"
            dist.Backend.register_backend(backend, _one_thread_of_gloo, devices=["cpu"])
        dist.init_process_group(
            backend,
            init_method=f"file://{file}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        result = (None, function(*args))
        dist.barrier()  # nobody leaves while another still needs it
    except BaseException:
        result = (traceback.format_exc(), None)
    answer.send_bytes(pickle.dumps(result))
    answer.close()
    # Not destroy_process_group(): while a gloo thread waits for the interpreter's lock it can deadlock in torch 2.13.
    os._exit(0)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = at_most(60),
    transport: str = "shared memory",
    hosts: str = "",
    group_timeout: float = at_most(10),
    lost: int | None = None,
) -> list[Any]:
    """Run `function(*args)` on `world_size` ranks and return their results in rank order.

    hosts: a letter for each rank, the name of its host. All are on the same one by default.
    group_timeout: of the process group, in seconds.
    lost: a rank that stops or dies without an answer; all others are waited for until `timeout`, also after an error.

    An exception on any rank fails the test with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers, processes = [], []
        for rank in range(world_size):
            receive, send = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(
                target=_rank,
                args=(function, args, rank, world_size, f"{folder}/store", send, transport, hosts, group_timeout),
                daemon=True,
            )
            process.start()
            send.close()
            answers.append(receive)
            processes.append(process)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        try:
            while {*range(world_size)} - {lost, *results, *errors} and (left := deadline - time.monotonic()) > 0:
                pending = [answer for r, answer in enumerate(answers) if r not in results and r not in errors]
                for answer in wait(pending, timeout=left):
                    rank = answers.index(answer)
                    try:
                        error, results[rank] = pickle.loads(answer.recv_bytes())
                    except EOFError:
                        error = "the process died without an answer"
                    if error is not None:
                        results.pop(rank, None)
                        errors[rank] = error
                        if lost is None:
                            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            silent = set(range(world_size)) - set(results) - set(errors)
            for process in processes:
                process.join(timeout=0 if silent else at_most(10))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    report = [f"rank {rank}:\n{error}" for rank, error in sorted(errors.items())]
    report += [f"rank {rank}: no answer within {timeout:.0f} s, or after another failed" for rank in sorted(silent)]
    if report:
        pytest.fail("\n".join(report), pytrace=False)
    return [results[rank] for rank in range(world_size)]
