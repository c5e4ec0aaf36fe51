"""What crosses the wire: the right rows, and no more bytes than DDP sends without sharding."""

import contextlib
import os
import socket
import struct

import pytest
import torch
import torch.distributed as dist
from given_rows import rows_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdam, bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.transport.calls import Calls
from zeroadam.transport.gloo import Gloo

NUMEL = 3_001_000


def gather(numels: list[int]) -> None:
    rank = dist.get_rank()
    gathers = []
    for shift in range(6):  # several under way at once
        rows = rows_of(torch.full((n,), float(r + shift if r == rank else -1)) for r, n in enumerate(numels))
        gathers.append((shift, rows, Gloo(dist.group.WORLD, Calls()).prepare_gather([rows])()))
    for shift, rows, (wait,) in gathers:
        wait()
        assert all(bool((row == r + shift).all()) for r, row in enumerate(rows))


@pytest.mark.parametrize("numels", [[5], [0, 3], [1_500_000, 7], [3, 0, 2_000_001, 1]], ids=str)
def test_all_gather(run_ranks, numels: list[int]) -> None:
    """Rows of any length, empty ones and those that travel as several messages among them."""
    run_ranks(gather, len(numels), numels)


def received_bytes() -> int:
    """Bytes that this process has received over TCP, without headers and repeats, which depend on the load."""
    received = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=int(name))  # raises for what is no socket
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                received += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received of linux/tcp.h
            connection.detach()  # gloo's, and still open
    return received


def count(what: str) -> int:
    """Bytes that this rank receives in a step: of the optimizer alone, or with backward through DDP and a hook."""
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 2000, bias=False), nn.ReLU(), nn.Linear(2000, 500), nn.Linear(500, 1))
    assert sum(param.numel() for param in net.parameters()) == NUMEL + 1
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdam(net.parameters(), bucket_cap_mb=1)
    if what != "step":
        model.register_comm_hook(optimizer, bf16_reduce_scatter_hook if what == "bf16" else reduce_scatter_hook)

    def step() -> None:
        if what != "step":
            model(torch.ones(1, 1000)).sum().backward()
        optimizer.step()

    if what == "step":
        model(torch.ones(1, 1000)).sum().backward()
    step()
    step()  # DDP has rebuilt its buckets
    dist.barrier()
    before = received_bytes()
    step()
    dist.barrier()  # all has arrived
    return received_bytes() - before


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="this system does not count what TCP receives")
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(("what", "bytes_per_element"), [("step", 4), ("hook", 8), ("bf16", 6)])
def test_bytes_on_the_wire(run_ranks, what: str, bytes_per_element: int, world_size: int) -> None:
    """(W-1)/W of the parameters for step(), as much again for the gradients with the hook, half of that in bfloat16."""
    payload = (world_size - 1) * NUMEL * bytes_per_element
    counted = sum(run_ranks(count, world_size, what))
    print(f"{what} W={world_size}: {counted} bytes, {counted / payload:.4f} of the payload")
    assert payload <= counted <= 1.0005 * payload
