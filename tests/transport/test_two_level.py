"""Several ranks on several hosts: the sums of a plain reference in the stated order, the fewest bytes, and no hang."""

import gc
import itertools
import os
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from given_rows import rows_of
from patience import at_most
from placed import ADAMW, HOOKS, Net, batch_of, expected_after, hosts_of, sum_over
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW, reduce_scatter_hook
from zeroadam.layout.shard import shard
from zeroadam.transport import choose, shared_memory
from zeroadam.transport.calls import Calls
from zeroadam.transport.carriers import parts_between
from zeroadam.transport.two_level import TwoLevel

PLACEMENTS = ["aab", "aba", "aabb", "abab", "abbb", "abba", "aaabc", "abcaa", "aabbb", "aabbcc", "abcabc", "abbccc"]


def exchange(placement: str, slot_bytes: int, exact: bool) -> None:
    shared_memory.SLOT_BYTES = slot_bytes
    rank, world_size = dist.get_rank(), dist.get_world_size()
    transport = choose(dist.group.WORLD, torch.device("cpu"), Calls(), ordered_sums=exact)
    assert isinstance(transport, TwoLevel)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lengths = torch.randint(0, 9000, (4, world_size), generator=generator)
        lengths[1], lengths[2] = 1, torch.tensor([5000] * (world_size - 1) + [0])
        every = [  # [exchange][rank that sends][owner]
            [[torch.randn(n, generator=generator).to(dtype) for n in numels] for _ in range(world_size)]
            for numels in lengths.tolist()
        ]
        gathers = []
        for part in (every[:1], every[1:]):  # several under way at once
            given = [
                rows_of(
                    of_ranks[owner][owner] if owner == rank else torch.full_like(of_ranks[0][owner], -1)
                    for owner in range(world_size)
                )
                for of_ranks in part
            ]
            gathers += list(zip(given, part, transport.prepare_gather(given)(), strict=True))
        for rows, of_ranks, wait in reversed(gathers) if rank % 2 else gathers:
            wait()
            assert all(torch.equal(row, of_ranks[owner][owner]) for owner, row in enumerate(rows))
        sums = []
        for part in (every[:3], every[3:]):
            given = [rows_of(of_ranks[rank]) for of_ranks in part]
            sums.append((given, part, transport.prepare_reduce(given, [[]] * len(part))()))
        for given, part, finish in sums:
            for rows, of_ranks, total in zip(given, part, finish(), strict=True):
                expected = sum_over(placement, [of_one[rank] for of_one in of_ranks], exact)
                assert torch.equal(total, expected), dtype
                assert not any(row.any() for owner, row in enumerate(rows) if owner != rank)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("slot_bytes", [2**14, 2**20])
@pytest.mark.parametrize(
    "placement", [pytest.param(p, marks=[] if p in ("aabb", "aaabc") else pytest.mark.slow) for p in PLACEMENTS]
)
def test_rows_of_any_length(run_ranks: Any, placement: str, slot_bytes: int, exact: bool) -> None:
    """Of all dtypes; empty ones, and those that are more messages than may be under way."""
    run_ranks(exchange, len(placement), placement, slot_bytes, exact, hosts=placement)


@pytest.mark.parametrize("carriers", [1, 2, 3, 4])
@pytest.mark.parametrize("owners", [1, 2, 3, 4])
def test_every_row_crosses_once_and_evenly(owners: int, carriers: int) -> None:
    parts = parts_between(range(owners), range(10, 10 + carriers))
    for owner in range(owners):
        ranges = [part.of(1200) for part in parts if part.owner == owner]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == 1200
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))
    for carrier in range(10, 10 + carriers):
        ranges = [part.of(1200) for part in parts if part.carrier == carrier]
        assert sum(stop - start for start, stop in ranges) == 1200 * owners // carriers
    if owners == carriers:
        assert [part[:4] for part in parts] == [(r, 10 + r, 0, carriers) for r in range(owners)]


def train(hook: str, dtype: torch.dtype, in_forward: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The sums that this rank owns after each backward, and the parameters at the end."""
    shared_memory.SLOT_BYTES = 2**16
    net = Net().to(dtype)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.3)
    optimizer = ZeroAdamW(model.parameters(), bucket_cap_mb=0.3, **ADAMW)
    assert type(optimizer._transports.of(torch.device("cpu"))) is TwoLevel
    if HOOKS[hook] is not None:
        model.register_comm_hook(optimizer, HOOKS[hook])
    if in_forward:
        optimizer.gather_in_forward(model)
    grads = []
    for step in range(5):
        if in_forward and step % dist.get_world_size() == dist.get_rank():
            with torch.no_grad():  # alone, while the others train
                for _ in range(3):
                    net(batch_of(0, 0, dtype))
        model(batch_of(dist.get_rank(), step, dtype)).square().sum().backward()
        grads += [param.grad.clone() for param in net.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return grads, [param.detach().clone() for param in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hook", ["same", "bfloat16"])
@pytest.mark.parametrize("placement", ["aab", "aabb", "abbb", "abab", "aaabc", "abccba"])
def test_training_is_that_of_one_process_fed_the_sums_in_the_stated_order(
    run_ranks: Any, placement: str, hook: str, dtype: torch.dtype
) -> None:
    *sums, params = expected_after(placement, hook, dtype)
    world_size = len(placement)
    for in_forward in (False, True):
        found = run_ranks(train, world_size, hook, dtype, in_forward, hosts=placement)
        for rank, (grads, mine) in enumerate(found):
            assert all(map(torch.equal, mine, params)), (rank, in_forward)
            for grad, total in zip(grads, [total for of_step in sums for total in of_step], strict=True):
                if grad.dim():
                    assert torch.equal(shard(grad, world_size, rank), shard(total, world_size, rank))
                    assert grad.count_nonzero() == shard(grad, world_size, rank).count_nonzero()


def faulty(fault: str, bad: int, where: str) -> None:
    """Ranks see what a killed, stopped or cut off one leaves them: an error, at once or after the timeout of 5 s."""
    group = dist.new_group(timeout=timedelta(seconds=5 if fault == "SIGSTOP" else 60))
    net = Net()
    model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=True, bucket_cap_mb=0.1)
    optimizer = ZeroAdamW(net.parameters(), process_group=group)
    model.register_comm_hook(optimizer, reduce_scatter_hook)

    def fail(*_: Any) -> Any:
        os.kill(os.getpid(), signal.Signals[fault])

    for step in range(4):
        if step == 2 and dist.get_rank() == bad:
            if where == "backward":
                net.layers[0].weight.register_hook(fail)
            else:
                TwoLevel._spread = fail  # type: ignore[method-assign]
        model(batch_of(dist.get_rank(), step, torch.float32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("where", ["backward", "gather"])
@pytest.mark.parametrize(("placement", "bad"), [("aabb", 1), ("abb", 0), ("aab", 1), ("aaabbb", 5)])
def test_a_rank_killed_or_stopped_ends_all_others(
    run_ranks: Any, placement: str, bad: int, where: str, fault: str
) -> None:
    start = time.monotonic()
    message = r"(has ended|did not come within|closed by peer|reset by peer|[Tt]imed out|lost another)"
    with pytest.raises(pytest.fail.Exception, match=message) as raised:
        run_ranks(faulty, len(placement), fault, bad, where, timeout=at_most(20), hosts=placement, lost=bad)
    assert time.monotonic() - start < at_most(8)
    report = str(raised.value)
    for rank in range(len(placement)):
        if rank != bad:
            assert re.search(rf"rank {rank}:\n(?!the process died)Traceback", report), report


def leaves() -> None:
    optimizer = ZeroAdamW([nn.Parameter(torch.ones(30, 40))])
    assert isinstance(optimizer._transports.of(torch.device("cpu")), TwoLevel)

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def threads() -> int:
        return sum(thread.name == "zeroadam" for thread in threading.enumerate())

    before = files()
    assert threads() == 1
    del optimizer
    gc.collect()
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == 0
    assert files() == before - 2 * (hosts_of("aab")[0].count(dist.get_rank()))
    assert "zeroadam-" not in Path("/proc/self/maps").read_text()


def test_nothing_is_left(run_ranks: Any) -> None:
    """No thread, no memory and no pipe of an optimizer that is no more."""
    run_ranks(leaves, 3, hosts="aab")
