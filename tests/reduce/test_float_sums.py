"""grad_dtype=torch.float32: float32 AdamW on copies of the parameters, fed sums of the bfloat16 gradients in float32.

The reference is one process with a plain copy of the model. It takes the gradients of each rank and each micro-batch
alone, adds them in float32, ranks in their order and then micro-batches in theirs, and divides by W.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from master_reference import WAYS, master_of, rounded
from placed import HOOKS, sum_over
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW

ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4, "fused": False}
STEPS, MICROS = 4, 3


class Net(nn.Module):
    """Large and small layers, a long matrix of three rows, channels_last, a 0-d parameter, one used now and then."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.narrow = nn.Linear(600, 301), nn.Linear(301, 600)
        self.sometimes = nn.Linear(600, 7)
        self.rows = nn.Parameter(torch.randn(3, 600))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.norm = nn.LayerNorm(600)
        self.to(dtype, memory_format=torch.channels_last)

    def forward(self, image: Tensor, x: Tensor, *, sometimes: bool) -> Tensor:
        y = self.narrow(torch.relu(self.wide(x))) + self.rows.sum(dim=0) + self.conv(image).mean() * self.scale
        y = self.norm(y.to(self.norm.weight.dtype)).to(x.dtype)
        if sometimes:
            y = y + self.sometimes(y).square().mean()
        return y.square().mean() + y.mean()


def batch_of(rank: int, step: int, micro: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    image = torch.randn(2, 3, 6, 6, generator=generator).to(dtype, memory_format=torch.channels_last)
    return image, torch.randn(4, 600, generator=generator).to(dtype)


def used(case: str, rank: int, step: int, micro: int) -> bool:
    """Whether the layer that is used now and then is: by some ranks, or by none in some micro-batches."""
    return case != "unused" or ((rank + step + micro) % 3 == 0 and micro != 1)


def micros_of(case: str) -> list[list[int]]:
    """Which micro-batches accumulate locally before they are reduced together."""
    return [[0, 1, 2]] if case == "no_sync" else [[0], [1], [2]]


def reference(placement: str, case: str, hook: str, dtype: torch.dtype, way: str) -> list[list[Tensor]]:
    """[step][parameter]: float32 masters, or parameters that have none, after each step; at the end parameters."""
    net, world_size = Net(dtype), len(placement)
    params = list(net.parameters())
    copies = [nn.Parameter(p.detach().clone().float() if way else p.detach().clone()) for p in params]
    optimizer = torch.optim.AdamW(copies, **ADAMW)
    found = []
    for step in range(STEPS):
        if case != "never" or step == 0:
            totals: list[Tensor | None] = [None] * len(params)
        for micros in micros_of(case):
            of_ranks = []
            for rank in range(world_size):
                net.zero_grad()
                for micro in micros:
                    net(*batch_of(rank, step, micro, dtype), sometimes=used(case, rank, step, micro)).backward()
                of_ranks.append([p.grad for p in params])
            for i, grads in enumerate(zip(*of_ranks, strict=True)):
                if all(grad is None for grad in grads):
                    continue
                sent = [torch.zeros_like(params[i]) if grad is None else grad for grad in grads]
                if hook == "bfloat16":
                    sent = [grad.bfloat16() for grad in sent]
                total = sum_over(placement, sent, exact=True)
                before = totals[i]
                totals[i] = total if before is None else before + total
        for param, copy, total in zip(params, copies, totals, strict=True):
            copy.grad = None if total is None else (total / world_size).to(copy.dtype)
            del param
        optimizer.step()
        with torch.no_grad():
            for param, copy in zip(params, copies, strict=True):
                param.copy_(rounded(copy.detach(), param, way))
        found.append([copy.detach().clone() for copy in copies])
    return found


def clears(case: str, net: nn.Module, optimizer: ZeroAdamW) -> Callable[[], None]:
    def by_hand() -> None:
        for param in net.parameters():
            param.grad = None

    def in_place() -> None:
        for param in net.parameters():
            if param.grad is not None:
                param.grad.data.zero_()

    return {
        "zero": lambda: optimizer.zero_grad(set_to_none=False),
        "module_none": net.zero_grad,
        "module_zero": lambda: net.zero_grad(set_to_none=False),
        "by hand": by_hand,
        "data": in_place,
        "never": lambda: None,
    }.get(case, optimizer.zero_grad)


def train(
    case: str, hook: str, dtype: torch.dtype, way: str, shape: tuple[int, int] | None, options: dict[str, Any]
) -> list[list[Tensor]]:
    net, rank = Net(dtype), dist.get_rank()
    if shape is not None:
        options = {**options, "device_mesh": init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))}
    optimizer = ZeroAdamW(net.parameters(), **ADAMW, **(WAYS[way] if way else {}), grad_dtype=torch.float32, **options)
    model = DistributedDataParallel(
        net, gradient_as_bucket_view=True, bucket_cap_mb=0.2, find_unused_parameters=case == "unused"
    )
    model.register_comm_hook(optimizer, HOOKS[hook])
    clear, params, found = clears(case, net, optimizer), list(net.parameters()), []
    for step in range(STEPS):
        if case == "skip":
            model(*batch_of(rank, step, 9, dtype), sometimes=True).backward()
            clear()
        for micros in micros_of(case):
            for micro in micros:
                with model.no_sync() if micro != micros[-1] else nullcontext():
                    batch = batch_of(rank, step, micro, dtype)
                    model(*batch, sometimes=used(case, rank, step, micro)).backward()
        optimizer.step()
        found.append([master_of(optimizer, p).clone() if way else p.detach().clone() for p in params])
        clear()
    for param in params:
        first = param.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, 0)
        assert torch.equal(first, param)
    return found


def compare(
    case: str,
    hook: str,
    dtype: torch.dtype,
    way: str,
    placement: str = "",
    shape: tuple[int, int] | None = None,
    **options: Any,
) -> None:
    expected = reference(placement or "a" * dist.get_world_size(), case, hook, dtype, way)
    for step, (mine, its) in enumerate(zip(train(case, hook, dtype, way, shape, options), expected, strict=True)):
        for i, (one, other) in enumerate(zip(mine, its, strict=True)):
            assert torch.equal(one, other), (step, i)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("transport", ["shared memory", "sockets", "backend", "late backend"])
@pytest.mark.parametrize("hook", ["same", "bfloat16"])
def test_bitwise_float32_adamw_fed_sums_in_float32(run_ranks: Any, hook: str, transport: str, world_size: int) -> None:
    run_ranks(compare, world_size, "plain", hook, torch.bfloat16, "master", transport=transport)


CASES = ["no_sync", "unused", "zero", "module_none", "module_zero", "by hand", "data", "never", "skip"]


@pytest.mark.parametrize("case", CASES)
def test_bitwise_however_gradients_are_zeroed_and_accumulate(run_ranks: Any, case: str) -> None:
    run_ranks(compare, 3, case, "same", torch.bfloat16, "master")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["", "remainder", "master"])
def test_bitwise_with_and_without_masters(run_ranks: Any, way: str, dtype: torch.dtype) -> None:
    """Without, Adam gets the mean gradient, rounded once."""
    run_ranks(compare, 3, "plain", "same", dtype, way)


@pytest.mark.parametrize("hook", ["same", "bfloat16"])
@pytest.mark.parametrize("placement", ["aabb", "abb", "abab"])
def test_bitwise_between_hosts(run_ranks: Any, placement: str, hook: str) -> None:
    """In the order of the ranks of a host, then of the hosts."""
    run_ranks(compare, len(placement), "plain", hook, torch.bfloat16, "master", placement, hosts=placement)


@pytest.mark.parametrize("hosts", ["", "aabb", "abab"])
@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (1, 2)], ids=str)
def test_bitwise_with_hybrid_sharding(run_ranks: Any, shape: tuple[int, int], hosts: str) -> None:
    """In the order of the ranks of a shard group, then of the groups."""
    groups = "".join(name * shape[1] for name in "ab"[: shape[0]])
    world_size = shape[0] * shape[1]
    for case in ("plain", "unused"):
        run_ranks(
            *(compare, world_size, case, "same", torch.bfloat16, "master", groups, shape), hosts=hosts[:world_size]
        )
