"""Through shared memory or through sockets: the same bits. And nothing stays behind."""

import gc
import logging
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from given_rows import rows_of
from patience import at_most
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW, bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.transport import hosts, shared_memory
from zeroadam.transport.calls import Calls
from zeroadam.transport.gloo import Gloo
from zeroadam.transport.hosts import find_hosts
from zeroadam.transport.shared_memory import SharedMemory
from zeroadam.transport.two_level import TwoLevel

HOOKS = {"none": None, "float32": reduce_scatter_hook, "bfloat16": bf16_reduce_scatter_hook}


def small_slots() -> None:
    """So that every message is many."""
    shared_memory.SLOT_BYTES = 2**14


def maps() -> list[str]:
    """Of this process, those that are shared regions."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "zeroadam-" in line]


def descriptors() -> list[str]:
    """Of this process, those of regions."""
    found = []
    for file in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{file}"))
        except FileNotFoundError:  # of the listing itself
            continue
    return [target for target in found if "zeroadam-" in target]


def transport_of(optimizer: ZeroAdamW) -> Any:
    return optimizer._transports.of(torch.device("cpu"))


def exchange(numels: list[int]) -> None:
    small_slots()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    transport = find_hosts(dist.group.WORLD).open(Calls())
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        every = [[torch.randn(n, generator=generator).to(dtype) for n in numels] for _ in range(3 * world_size)]
        gathers = []
        for shift in range(3):  # several under way at once
            rows = rows_of(row if r == rank else torch.full_like(row, -1) for r, row in enumerate(every[shift]))
            gathers.append((rows, transport.prepare_gather([rows])()))
        for shift, (rows, (wait,)) in enumerate(gathers):
            wait()
            assert all(torch.equal(row, expected) for row, expected in zip(rows, every[shift], strict=True))
        sums = []
        for shift in range(3):
            sums.append(transport.prepare_reduce([rows_of(every[shift * world_size + rank])], [[]])())
        for shift, finish in enumerate(sums):
            total = every[shift * world_size][rank]
            total = total.float() if dtype == torch.bfloat16 else total.clone()
            for source in range(1, world_size):
                total += every[shift * world_size + source][rank]
            assert torch.equal(finish()[0], total)


@pytest.mark.parametrize("numels", [[5, 5], [0, 3], [70_000, 7], [3, 0, 50_001], [9, 8, 30_000, 20_000]], ids=str)
def test_rows_of_any_length(run_ranks, numels: list[int]) -> None:
    """Empty ones, and those that are more messages than may be under way."""
    run_ranks(exchange, len(numels), numels)


def train(hook: str, dtype: torch.dtype) -> list[Tensor]:
    small_slots()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 520), nn.ReLU(), nn.Linear(520, 7), nn.Linear(7, 3)).to(dtype)
    net.register_parameter("scale", nn.Parameter(torch.ones((), dtype=dtype)))
    model = DistributedDataParallel(nn.Sequential(net, Scale(net.scale)), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model.parameters(), lr=1e-2, fused=False)
    if HOOKS[hook] is not None:
        model.register_comm_hook(optimizer, HOOKS[hook])
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for step in range(4):
        with model.no_sync() if step == 2 else torch.enable_grad():
            model(torch.randn(5, 300, generator=generator).to(dtype)).square().sum().backward()
        if step == 2:
            continue
        found += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    assert (not isinstance(transport_of(optimizer), SharedMemory)) == (os.environ.get("ZEROADAM_SHARED_MEMORY") == "0")
    return found + [p.detach().clone() for p in model.parameters()]


class Scale(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def on_sockets(function: Any, *args: Any) -> Any:
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    return function(*args)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hook", HOOKS)
def test_both_transports_give_the_same_bits(run_ranks, hook: str, dtype: torch.dtype, world_size: int) -> None:
    shared = run_ranks(train, world_size, hook, dtype)
    sockets = run_ranks(on_sockets, world_size, train, hook, dtype)
    for mine, its in zip(shared, sockets, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def falls_back(how: str) -> tuple[list[str], list[Tensor]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zeroadam").addHandler(handler)
    logging.getLogger("zeroadam").setLevel(logging.INFO)
    make, readlink = hosts._Offer.make, os.readlink
    if dist.get_rank() == 1:
        if how == "space":  # the memory of a region is reserved, so that its lack shows now
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        elif how == "elsewhere":  # another process there has the number

            def make_elsewhere(offer: Any, others: list[int]) -> None:
                make(offer, others)
                offer.process = 1

            hosts._Offer.make = make_elsewhere
        elif how == "variable":
            os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
        elif how == "forbidden":

            def refuse(path: str) -> str:
                if path.startswith(f"/proc/{os.getpid()}/"):
                    return readlink(path)
                raise PermissionError(13, "Permission denied", path)

            hosts.os.readlink = refuse
    params = [nn.Parameter(torch.ones(30, 40))]
    optimizer = ZeroAdamW(params)
    shared = dist.get_world_size() - 1 if dist.get_rank() != 1 else 1
    assert type(transport_of(optimizer)) is (Gloo if dist.get_world_size() == 2 else TwoLevel)
    assert len(maps()) == (shared if shared > 1 else 0)
    params[0].grad = torch.ones(30, 40)
    optimizer.step()
    return lines, [params[0].detach().clone()]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("space", "File too large"),
        ("elsewhere", "/proc/1/fd/"),
        ("variable", "ZEROADAM_SHARED_MEMORY=0"),
        ("forbidden", "Permission denied"),
    ],
)
def test_without_shared_memory_sockets_are_used(run_ranks, how: str, reason: str, world_size: int) -> None:
    """To and from the rank that has none, which is a host of its own then; rank 0 says so in one line."""
    (said, params), *others = run_ranks(falls_back, world_size, how)
    assert len(said) == 1
    between = (
        "within each of 2 hosts, [0, 2], [1], sockets between them" if world_size == 3 else "between the ranks, so"
    )
    assert said[0].startswith(f"{'no ' * (world_size == 2)}shared memory {between}")
    assert "; rank " in said[0]
    assert reason in said[0]
    assert all(lines == [] and torch.equal(found[0], params[0]) for lines, found in others)


def leaves(how: str) -> list[str]:
    optimizer = ZeroAdamW([nn.Parameter(torch.ones(30, 40))])
    assert len(maps()) == dist.get_world_size()
    assert descriptors() == []
    names = [line.split()[-2] for line in maps()]
    if how == "deleted":
        del optimizer
        gc.collect()
        assert maps() == []
    elif how == "raised":
        try:
            raise ValueError
        except ValueError:
            return names
    elif how == "killed":
        gone: list[Any] = [None] * 2
        dist.all_gather_object(gone, names)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return names


@pytest.mark.parametrize("how", ["deleted", "raised"])
def test_nothing_is_left(run_ranks, how: str) -> None:
    before = set(os.listdir("/dev/shm"))
    names = run_ranks(leaves, 2, how)
    assert names[0] == names[1]
    assert len(set(names[0])) == 2
    assert_nowhere(names[0])
    assert {name for name in set(os.listdir("/dev/shm")) - before if "zeroadam" in name} == set()


def test_nothing_is_left_of_a_killed_rank(run_ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match="the process died without an answer"):
        run_ranks(leaves, 2, "killed")
    assert not [name for name in os.listdir("/dev/shm") if "zeroadam" in name]


def assert_nowhere(names: list[str]) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "maps").read_text()
        except OSError:
            continue
        assert not any(name in text for name in names)


def waits_in_vain(why: str, folder: str) -> None:
    params = [nn.Parameter(torch.ones(30, 40))]
    optimizer = ZeroAdamW(params)
    params[0].grad = torch.ones(30, 40)
    dist.barrier()
    assert isinstance(transport_of(optimizer), SharedMemory)
    if dist.get_rank() == 1:
        if why == "has ended":
            os.kill(os.getpid(), signal.SIGKILL)
        while not Path(folder, "raised").exists():
            time.sleep(0.05)
    transport_of(optimizer).timeout = 0.5 if why.startswith("did not") else at_most(10)
    with pytest.raises(RuntimeError, match=f"rank 1 of the process group {why}"):
        optimizer.step()
    Path(folder, "raised").touch()


@pytest.mark.parametrize("why", ["has ended", "did not come within 0 s"])
def test_a_rank_that_does_not_come_is_named(run_ranks, why: str, tmp_path: Path) -> None:
    """At once if it has ended, else after the timeout of the process group."""
    with pytest.raises(pytest.fail.Exception):
        run_ranks(waits_in_vain, 2, why, str(tmp_path))
    assert (tmp_path / "raised").exists()


def test_two_jobs_on_a_host_do_not_meet(run_ranks) -> None:
    alone = run_ranks(train, 2, "float32", torch.float32)
    found: list[Any] = [None, None]

    def job(index: int) -> None:
        found[index] = run_ranks(train, 2, "float32", torch.float32)

    threads = [threading.Thread(target=job, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ranks in found:
        for mine, its in zip(ranks, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
