"""What crosses the wire: the right rows, and no more bytes than DDP sends without sharding."""

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdam, bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.collectives import all_gather

NUMEL = 3_001_000
STEPS = 9


def gather(numels: list[int]) -> None:
    rank = dist.get_rank()
    gathers = []
    for shift in range(6):  # several under way at once
        rows = [torch.full((n,), float(r + shift if r == rank else -1)) for r, n in enumerate(numels)]
        gathers.append((shift, rows, all_gather([rows], dist.group.WORLD)))
    for shift, rows, wait in gathers:
        wait()
        assert all(bool((row == r + shift).all()) for r, row in enumerate(rows))


@pytest.mark.parametrize("numels", [[5], [0, 3], [1_500_000, 7], [3, 0, 2_000_001, 1]], ids=str)
def test_all_gather(run_ranks, numels: list[int]) -> None:
    """Rows of any length, empty ones and those that travel as several messages among them."""
    run_ranks(gather, len(numels), numels)


def sent_bytes() -> int:
    """Bytes sent on the loopback interface of this process's network namespace, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def count(what: str) -> float:
    """Bytes of one step, per rank: of the optimizer alone, or with backward through DDP and a hook."""
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
    counts = []
    for _ in range(STEPS):
        dist.barrier()
        before = sent_bytes()
        dist.barrier()
        step()
        dist.barrier()  # all have received: nothing of a step is still to be sent
        counts.append((sent_bytes() - before) / dist.get_world_size())
    return statistics.median(counts)  # in some steps TCP sends smaller packets, with more headers


def can_unshare() -> bool:
    return (
        shutil.which("unshare") is not None and subprocess.run(["unshare", "-rn", "true"], check=False).returncode == 0
    )


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a network namespace (root, or user namespaces)")
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(("what", "bytes_per_element"), [("step", 4), ("hook", 8), ("bf16", 6)])
def test_bytes_on_the_wire(what: str, bytes_per_element: int, world_size: int, tmp_path: Path) -> None:
    """(W-1)/W of the parameters for step(), as much again for the gradients with the hook, half of that in bfloat16.

    Counted on a loopback interface of its own, where nobody else sends. TCP adds some 0.2 % for headers and answers.
    """
    command = f"ip link set lo up && exec {sys.executable} {__file__} {what} {world_size} {tmp_path}"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "ZEROADAM_SHARED_MEMORY": "0"}
    subprocess.run(["unshare", "-rn", "sh", "-c", command], check=True, env=environment, timeout=100)
    payload = (world_size - 1) / world_size * NUMEL * bytes_per_element
    counted = float((tmp_path / "out").read_text())
    print(f"{what} W={world_size}: {counted:.0f} bytes, {counted / payload:.4f} of the payload")
    assert 0.99 * payload <= counted <= 1.01 * payload


def counting_rank(rank: int, what: str, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    counted = count(what)
    if rank == 0:
        Path(folder, "out").write_text(str(counted))
    os._exit(0)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        counting_rank, (sys.argv[1], int(sys.argv[2]), sys.argv[3]), nprocs=int(sys.argv[2]), start_method="fork"
    )
