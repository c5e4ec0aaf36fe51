"""float16 gradients where the backend itself adds do not overflow where DDP's own mean does not."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_a_backend import on_a_backend
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW, bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.layout.rows import RowRules
from zeroadam.layout.shard import shard
from zeroadam.transport import Backend

SHAPES = [(101, 7), (40, 12), (3, 2), (), (2, 200), (7,)]
MAX = 65504.0  # the largest number of float16


class Net(nn.Module):
    """The gradient of each parameter is what is given for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(shape, dtype=torch.float16) for shape in SHAPES])

    def forward(self, grads: dict[int, Tensor]) -> Tensor:
        return torch.stack([(self.weights[i] * grad).sum() for i, grad in grads.items()]).sum()


def pair(hook: Any = reduce_scatter_hook) -> tuple[Any, Any, ZeroAdamW]:
    """Ours, DDP's own, and the optimizer of ours."""
    Backend.rules = RowRules(equal=True, direct_bytes=500, large_bytes=1000)
    ours, plain = (
        DistributedDataParallel(Net(), gradient_as_bucket_view=True, find_unused_parameters=True) for _ in range(2)
    )
    return ours, plain, ZeroAdamW(ours, lr=1e-2, hook=hook)


def own(grad: Tensor) -> Tensor:
    return shard(grad, dist.get_world_size(), dist.get_rank())


def large(hook: Any) -> None:
    ours, plain, optimizer = pair(hook)
    # bfloat16 rounds numbers above 65280 to 65536, which is none in float16.
    most, bound = (MAX, 2**-9) if hook is reduce_scatter_hook else (65280.0, 2**-6)
    weights = enumerate(ours.module.weights)
    grads = {i: torch.linspace(-most, most, max(1, w.numel())).half().view(w.shape) for i, w in weights}
    for _ in range(3):  # DDP rebuilds its buckets in the second
        for model in (ours, plain):
            model(grads).backward()
        for mine, its in zip(ours.parameters(), plain.parameters(), strict=True):
            finite = own(its.grad).isfinite()
            # Rounded thirds of the largest number add up to more than that.
            assert finite.all() if dist.get_world_size() != 3 else finite.sum() >= 0.99 * finite.numel() - 2
            torch.testing.assert_close(own(mine.grad)[finite], own(its.grad)[finite], rtol=bound, atol=0)
        assert optimizer.clip_grad_norm_(math.inf).isfinite() or dist.get_world_size() == 3
        ours.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("hook", [reduce_scatter_hook, bf16_reduce_scatter_hook])
@on_a_backend(2, 3, 4)
def test_the_largest_gradients_have_a_finite_mean(run_ranks: Any, transport: str, world_size: int, hook: Any) -> None:
    """As DDP's have, to a rounding; to a few of bfloat16 where that is on the way."""
    run_ranks(large, world_size, hook, transport=transport)


def thawed() -> None:
    """A parameter that was frozen in the first backwards is trained in the next ones, and nothing is zeroed."""
    ours, plain, _ = pair()
    grads = {i: torch.full(shape, 1.0 + dist.get_rank()).half() for i, shape in enumerate(SHAPES)}
    for trained in (False, False, True, True):
        for model in (ours, plain):
            model.module.weights[0].requires_grad_(trained)
            model(grads).backward()
        for mine, its in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (its.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(own(mine.grad), own(its.grad), rtol=0.02, atol=0)


@on_a_backend(2)
def test_a_parameter_may_be_thawed(run_ranks: Any, transport: str, world_size: int) -> None:
    run_ranks(thawed, world_size, transport=transport)


def added() -> None:
    """Backwards that add up, in and out of `no_sync()`, on what was zeroed in either way, and stepped in between."""
    ours, plain, optimizer = pair()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    choices = torch.Generator().manual_seed(1)  # alike on all ranks
    values = torch.Generator().manual_seed(100 + dist.get_rank())
    added = 0
    for _ in range(60):
        what = int(torch.randint(0, 6, (), generator=choices))
        if what == 0:
            ours.zero_grad()
            plain.zero_grad()
            added = 0
        elif what == 1:
            optimizer.zero_grad(set_to_none=False)
            adamw.zero_grad(set_to_none=False)
            added = 0
        elif what == 2 and added:
            optimizer.step()
            adamw.step()
        else:
            for sync in (False, True) if what == 3 else (True,):
                # Some parameters are left out by some ranks, or by all.
                used = [i for i in range(len(SHAPES)) if torch.rand((), generator=choices) < 0.8] or [0]
                used = [i for i in used if torch.rand((), generator=values) < 0.9] or [0]
                grads = {i: torch.randn(SHAPES[i], generator=values).half() for i in used}
                for model in (ours, plain):
                    with nullcontext() if sync else model.no_sync():
                        model(grads).backward()
            added += 1
            if added == 5:  # roundings add up as well
                ours.zero_grad()
                plain.zero_grad()
                added = 0
        for mine, its in zip(ours.parameters(), plain.parameters(), strict=True):
            # A step is of 1e-2, in whatever direction where a gradient is zero but for roundings.
            assert (mine - its).abs().float().mean() <= 2e-3
            assert (mine.grad is None) == (its.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(own(mine.grad), own(its.grad), rtol=0.02, atol=0.02)
                if mine.dim():
                    rest = mine.grad.clone()
                    own(rest).zero_()
                    assert not rest.any()


@on_a_backend(2, 3, 4)
def test_backwards_add_up_to_the_gradients_of_ddp(run_ranks: Any, transport: str, world_size: int) -> None:
    """Of numbers of order 1, to some roundings of float16."""
    run_ranks(added, world_size, transport=transport)
