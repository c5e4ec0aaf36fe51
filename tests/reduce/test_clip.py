"""optimizer.clip_grad_norm_ is torch's on the full mean gradient, though each rank looks at its own pieces only."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_a_backend import on_a_backend
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from zeroadam import ZeroAdamW, reduce_scatter_hook
from zeroadam.layout.shard import shard


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 300), nn.Linear(300, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(torch.relu(self.first(x))) * self.scale).square().mean()


def models(hook: bool) -> tuple[nn.Module, ZeroAdamW, nn.Module]:
    ours, plain = (DistributedDataParallel(Net(), gradient_as_bucket_view=True) for _ in range(2))
    optimizer = ZeroAdamW(ours.parameters(), lr=1e-2, fused=False)
    if hook:
        ours.register_comm_hook(optimizer, reduce_scatter_hook)
    return ours, optimizer, plain


def clipped(hook: bool) -> None:
    ours, optimizer, plain = models(hook)
    data = torch.Generator().manual_seed(dist.get_rank())
    norms: list[Any] = [1, 2.0, 3, 0.5, math.inf, "inf"]
    for norm_type in norms:
        for max_norm in (1e-3, 1e6):
            x = torch.randn(5, 7, generator=data)
            for model in (ours, plain):
                model.zero_grad()
                model(x).backward()
            total = optimizer.clip_grad_norm_(max_norm, float(norm_type))
            expected = clip_grad_norm_(plain.parameters(), max_norm, norm_type)
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
            for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
                if p.grad is None:
                    continue
                grad = shard(p.grad, dist.get_world_size(), dist.get_rank())
                grad = grad / dist.get_world_size() if hook and p.dim() > 0 else grad
                torch.testing.assert_close(
                    grad, shard(q.grad, dist.get_world_size(), dist.get_rank()), rtol=1e-5, atol=1e-9
                )
    with pytest.raises(ValueError, match="norm_type must be positive or inf, not 0"):
        optimizer.clip_grad_norm_(1.0, 0)
    optimizer.step()  # takes the clipped gradients for what the hook wrote
    optimizer.zero_grad()
    assert optimizer.clip_grad_norm_(1.0) == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("hook", [False, True])
def test_norm_and_clipped_gradients_are_those_of_torch(run_ranks, hook: bool, world_size: int) -> None:
    """Any norm, clipping and not, to 1e-5: another order of summation."""
    run_ranks(clipped, world_size, hook)


@on_a_backend(1, 2, 3, 4)
def test_norm_and_clipped_gradients_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    run_ranks(clipped, world_size, True, transport=transport)


def other_tensors() -> None:
    """On one rank: all refuse, and can go on."""
    _, optimizer, _ = models(False)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    first = dist.get_rank() == 0
    with pytest.raises(RuntimeError, match="disagree on the call: clip_grad_norm_"):
        optimizer.clip_grad_norm_(torch.tensor(0.10001 if first else 0.10002))  # type: ignore[arg-type]
    with pytest.raises((ValueError, RuntimeError), match=r"norm_type must be positive|rank 0 .* refused"):
        optimizer.clip_grad_norm_(1.0, norm_type=0 if first else 2)
    optimizer.clip_grad_norm_(torch.tensor(0.1))  # type: ignore[arg-type]
    optimizer.clip_grad_value_(torch.tensor(0.1))  # type: ignore[arg-type]
    optimizer.step()


def test_arguments_that_are_tensors_or_refused_on_one_rank(run_ranks) -> None:
    run_ranks(other_tensors, 2)


def nonfinite(hook: bool) -> None:
    ours, optimizer, _ = models(hook)
    x = torch.ones(5, 7)
    if dist.get_rank() == 1:
        x[0, 0] = math.inf
    ours(x).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, math.inf, error_if_nonfinite=True)
    assert not optimizer.clip_grad_norm_(1.0).isfinite()
    optimizer.zero_grad()
    for param in ours.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    if not hook:  # only the piece that rank 1 owns is nan
        shard(ours.module.first.weight.grad, 3, 1).fill_(math.nan)
        assert optimizer.clip_grad_norm_(1.0, math.inf).isnan()


@pytest.mark.parametrize("hook", [False, True])
def test_a_norm_that_is_not_finite_raises_on_every_rank_if_asked(run_ranks, hook: bool) -> None:
    run_ranks(nonfinite, 3, hook)


def other_arguments() -> None:
    """A look at the gradients that is not the same on all ranks raises on all, and changes nothing."""
    _, optimizer, net = models(False)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    before = [param.grad.clone() for param in net.parameters()]
    odd = dist.get_rank() == 1
    calls = [
        lambda: optimizer.clip_grad_norm_(2.0 if odd else 1.0),
        lambda: optimizer.clip_grad_norm_(1.0, norm_type=1.0 if odd else 2.0),
        lambda: optimizer.clip_grad_value_(0.1 if odd else 0.2),
        lambda: optimizer.grads_are_finite() if odd else optimizer.clip_grad_norm_(1.0),
        lambda: optimizer.clip_grad_value_(0.1) if odd else optimizer.clip_grad_norm_(1.0),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"disagree on the call: clip_grad_.* on rank 0; .*\) on rank 1"):
            call()
    assert all(map(torch.equal, before, (param.grad for param in net.parameters())))
    optimizer.step()


@pytest.mark.parametrize("transport", ["shared memory", "sockets"])
def test_calls_that_differ_between_ranks_are_refused(run_ranks, transport: str) -> None:
    run_ranks(other_arguments, 2, transport=transport)
