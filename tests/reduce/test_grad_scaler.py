"""Loss scaling: all ranks skip a step together, and their scales stay equal, whoever saw the infinity."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from on_a_backend import on_a_backend
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from zeroadam import GradScaler, ZeroAdamW, reduce_scatter_hook

STEPS = 24


class Net(nn.Module):
    """With one parameter whose gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
        self.given = nn.Parameter(torch.zeros(STEPS))

    def forward(self, x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers(x), (self.given * gradient).sum()


def train(kind: str, clip: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Scales after every step, and parameters at last. Now and then one number of one rank's gradients overflows.

    With the hook only the rank that owns it sees that.

    kind: "hook" (zeroadam.GradScaler), "ours" (without the hook, torch's scaler) or "torch" (torch.optim.AdamW).
    """
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    head = nn.Parameter(torch.ones(4))  # another optimizer with the same scaler
    cls = torch.optim.AdamW if kind == "torch" else ZeroAdamW
    optimizer, other = cls(net.parameters(), lr=1e-2, fused=False), torch.optim.SGD([head], lr=1e-2)
    scaler = (GradScaler if kind == "hook" else torch.amp.GradScaler)("cpu", init_scale=2.0**12, growth_interval=3)
    if kind == "hook":
        model.register_comm_hook(optimizer, reduce_scatter_hook)
    data = torch.Generator().manual_seed(dist.get_rank())
    scales = []
    for step in range(STEPS):
        x, gradient = torch.randn(6, 8, generator=data), torch.zeros(STEPS)
        if step % 7 == 3 and dist.get_rank() == step % dist.get_world_size():
            gradient[step] = math.inf
        found, apart = model(x, gradient)
        scaler.scale((found * head.detach()).square().mean() + apart).backward()
        head.grad = torch.full_like(head, float(scaler.get_scale()))
        if clip:
            scaler.unscale_(optimizer)
            if kind == "hook":
                optimizer.clip_grad_norm_(0.1)
            else:
                clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.step(other)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales, [param.detach() for param in (*net.parameters(), head)]


def compare(kind: str, clip: bool) -> None:
    scales, params = train(kind, clip)
    expected_scales, expected = train("torch", clip)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, scales)
    assert everywhere == [expected_scales] * dist.get_world_size()
    assert {(after > before) - (after < before) for before, after in itertools.pairwise(scales)} == {-1, 0, 1}
    for ours, plain in zip(params, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
        assert ours.isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["hook", "ours"])
def test_scales_and_parameters_are_those_of_ddp_with_adamw(run_ranks, kind: str, clip: bool, world_size: int) -> None:
    """torch's own scaler without the hook, ours with it; to 1e-4, for sums in another order, after 24 steps of 1e-2."""
    run_ranks(compare, world_size, kind, clip)


@on_a_backend(1, 2, 3, 4)
def test_scales_and_parameters_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    run_ranks(compare, world_size, "hook", True, transport=transport)


def refused(clip: bool) -> None:
    net = nn.Linear(8, 4)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.zeros_(net.bias)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(net.parameters())
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    scaler = torch.amp.GradScaler("cpu")
    x = torch.ones(2, 8)
    x[0, 0] = math.inf if dist.get_rank() == 0 else 1.0
    scaler.scale(model(x).sum()).backward()
    if clip:
        scaler.unscale_(optimizer)
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"use zeroadam\.GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("unscale", [False, True])
def test_torch_scaler_after_the_hook_is_refused_on_every_rank(run_ranks, unscale: bool) -> None:
    """Also on a rank whose own gradients are finite while another's are not: none waits for the other."""
    run_ranks(refused, 2, unscale)
