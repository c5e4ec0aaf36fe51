"""What crosses the wire: the right rows, and no more than an all-gather's (W-1)/W of the parameters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from zeroadam import ZeroAdam
from zeroadam.collectives import all_gather

NUMEL = 3_000_000
STEPS = 5


def gather(numels: list[int]) -> None:
    rank = dist.get_rank()
    gathers = []
    for shift in range(6):  # several under way at once
        rows = [torch.full((n,), float(r + shift if r == rank else -1)) for r, n in enumerate(numels)]
        gathers.append((shift, rows, all_gather(rows, dist.group.WORLD)))
    for shift, rows, works in gathers:
        for work in works:
            work.wait()
        assert all(bool((row == r + shift).all()) for r, row in enumerate(rows))


@pytest.mark.parametrize("numels", [[5], [0, 3], [1_500_000, 7], [3, 0, 2_000_001, 1]], ids=str)
def test_all_gather(run_ranks, numels: list[int]) -> None:
    """Rows of any length, empty ones and those that travel as several messages among them."""
    run_ranks(gather, len(numels), numels)


def sent_bytes() -> int:
    """Bytes sent on the loopback interface of this process's network namespace, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def count() -> float:
    """Bytes per step and rank, averaged over the ranks, beside those of a step without parameters."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(1000, 2000)), *(nn.Parameter(torch.randn(100, 100)) for _ in range(100))]
    assert sum(param.numel() for param in params) == NUMEL
    optimizer = ZeroAdam(params, bucket_cap_mb=1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    dist.barrier()
    before = sent_bytes()
    dist.barrier()
    for _ in range(STEPS):
        optimizer.step()
    dist.barrier()  # all have received: nothing of a step is still to be sent
    return (sent_bytes() - before) / STEPS / dist.get_world_size()


def can_unshare() -> bool:
    return (
        shutil.which("unshare") is not None and subprocess.run(["unshare", "-rn", "true"], check=False).returncode == 0
    )


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a network namespace (root, or user namespaces)")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_sends_the_bytes_of_an_all_gather(world_size: int, tmp_path: Path) -> None:
    """On a loopback interface of its own, where nobody else sends. TCP adds under 3 % for headers and answers."""
    command = f"ip link set lo up && exec {sys.executable} {__file__} {world_size} {tmp_path}"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(["unshare", "-rn", "sh", "-c", command], check=True, env=environment, timeout=100)
    payload = (world_size - 1) / world_size * NUMEL * 4
    counted = float((tmp_path / "out").read_text())
    print(f"W={world_size}: {counted:.0f} bytes, {counted / payload:.4f} of the payload")
    assert payload <= counted <= 1.03 * payload


def counting_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    counted = count()
    if rank == 0:
        Path(folder, "out").write_text(str(counted))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        counting_rank, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]), start_method="fork"
    )
