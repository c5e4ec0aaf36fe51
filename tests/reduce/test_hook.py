"""reduce_scatter_hook: the numbers are those of one process whose gradient is the rank-ordered mean, to the bit.

Every rank computes the local gradients of all ranks with a plain copy of the model, adds them in rank order, divides by
W and feeds torch.optim.AdamW: that is the reference.
"""

import copy
import itertools
import math
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_a_backend import BACKENDS, on_a_backend
from patience import at_most
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from zeroadam import GradScaler, ZeroAdamW, bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.layout.shard import shard
from zeroadam.reduce import hook

STEPS = 6
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "fused": False}


class Net(nn.Module):
    """Large and small layers, tied weights, channels_last, a 0-d parameter, one used now and then, two dtypes."""

    def __init__(self, *, use_checkpoint: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use_checkpoint = use_checkpoint
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.embedding = nn.Embedding(11, 600)
        self.wide, self.narrow = nn.Linear(600, 300), nn.Linear(300, 600)
        self.sometimes = nn.Linear(600, 600)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(600, 11)
        self.head.weight = self.embedding.weight
        self.exact = nn.Linear(7, 5).double()
        self.to(memory_format=torch.channels_last)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.wide(x)))

    def forward(self, data: dict[str, Tensor], *, sometimes: bool) -> Tensor:
        x = self.embedding(data["token"])
        x = checkpoint(self.middle, x, use_reentrant=False) if self.use_checkpoint else self.middle(x)
        x = x + self.conv(data["image"]).mean() * self.scale + self.exact(data["double"]).mean().float()
        if sometimes:
            x = x + self.sometimes(x)
        return nn.functional.cross_entropy(self.head(torch.tanh(x)), data["token"].roll(1))


def data_of(rank: int, step: int, micro: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return {
        "image": torch.randn(2, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last),
        "token": torch.randint(0, 11, (5,), generator=generator),
        "double": torch.randn(2, 7, generator=generator, dtype=torch.float64),
    }


def reference(world_size: int, offset: int, micros: int, use_sometimes: Callable[[int, int], bool]) -> list[Tensor]:
    """One process that adds up the gradients of all ranks in rank order."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    params = list(model.parameters())
    for step in range(STEPS):
        of_ranks = []
        for rank in range(world_size):
            optimizer.zero_grad()
            for micro in range(micros):
                model(data_of(rank + offset, step, micro), sometimes=use_sometimes(rank, step)).backward()
            of_ranks.append([param.grad for param in params])
        for param, grads in zip(params, zip(*of_ranks, strict=True), strict=True):
            total = None
            for grad in grads:
                if any(g is not None for g in grads):
                    grad = torch.zeros_like(param) if grad is None else grad
                    total = grad if total is None else total + grad
            param.grad = None if total is None else total / world_size
        optimizer.step()
    return [param.detach() for param in params]


def train(case: str, bucket_cap_mb: float = 0.5, *, zero: bool = True) -> list[Tensor]:
    """DDP + ZeroAdamW with the hook, or DDP + torch.optim.AdamW."""
    group = dist.group.WORLD
    if case == "pairs":
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = pairs[dist.get_rank() // 2]
    net = Net(use_checkpoint=case == "checkpoint")
    optimizer: Any = (ZeroAdamW if zero else torch.optim.AdamW)(
        net.parameters(), **ADAMW, **({"process_group": group, "ordered_sums": True} if zero else {})
    )
    module = torch.compile(net, backend="aot_eager") if case == "compile" else net
    model = DistributedDataParallel(
        module,
        process_group=group,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_cap_mb,
        find_unused_parameters=case.startswith("unused"),
        static_graph=case == "static_graph",
    )
    if zero:
        model.register_comm_hook(optimizer, reduce_scatter_hook)
    clear: dict[str, Callable[[], None]] = {
        "zero": lambda: optimizer.zero_grad(set_to_none=False),
        "module_none": net.zero_grad,
        "module_zero": lambda: net.zero_grad(set_to_none=False),
        "ddp_none": model.zero_grad,
        "ddp_zero": lambda: model.zero_grad(set_to_none=False),
        "unused_zero": lambda: optimizer.zero_grad(set_to_none=False),
    }
    micros = 2 if case == "no_sync" else 1
    for step in range(STEPS):
        for attempt in range(2 if case == "skip" else 1):
            for micro in range(micros):
                with model.no_sync() if case == "no_sync" and micro == 0 else nullcontext():
                    data = data_of(dist.get_rank(), step, 7 if case == "skip" and attempt == 0 else micro)
                    model(data, sometimes=sometimes_in(case)(dist.get_rank(), step)).backward()
            if case == "skip" and attempt == 0:
                optimizer.zero_grad()  # as if this backward had been no good
        optimizer.step()
        clear.get(case, optimizer.zero_grad)()
    for param in net.parameters():
        first = param.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, group_src=0, group=group)
        assert torch.equal(first, param)
    return [param.detach() for param in net.parameters()]


def sometimes_in(case: str) -> Callable[[int, int], bool]:
    if case == "unused_by_all":
        return lambda _, step: step % 3 == 1
    if case in ("unused_by_some", "unused_zero"):
        return lambda rank, step: (rank + step) % 2 == 0
    return lambda *_: True


def compare(case: str, bucket_cap_mb: float) -> None:
    world_size, offset = dist.get_world_size(), 0
    if case == "pairs":
        world_size, offset = 2, dist.get_rank() // 2 * 2
    micros = 2 if case == "no_sync" else 1
    found = train(case, bucket_cap_mb)
    if dist.get_rank() == offset:  # with whose parameters those of the others have been compared
        for param, value in zip(found, reference(world_size, offset, micros, sometimes_in(case)), strict=True):
            assert torch.equal(param, value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("bucket_cap_mb", [0.01, 0.5, 100])
def test_bitwise_equal_to_adam_fed_the_rank_ordered_mean(run_ranks, bucket_cap_mb: float, world_size: int) -> None:
    """Whatever the size of DDP's buckets, which it also rebuilds after the first step."""
    run_ranks(compare, world_size, "plain", bucket_cap_mb)


@on_a_backend(1, 2, 3, 4)
def test_bitwise_equal_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    """With `ordered_sums=True`, which elsewhere changes nothing."""
    run_ranks(compare, world_size, "plain", 0.5, transport=transport)


CASES = [
    *(
        "no_sync",
        "skip",
        "unused_by_all",
        "unused_by_some",
        "unused_zero",
        "static_graph",
        "checkpoint",
        pytest.param("compile", marks=pytest.mark.slow),
    ),
    *("zero", "module_none", "module_zero", "ddp_none", "ddp_zero"),
]


@pytest.mark.parametrize("case", CASES)
def test_bitwise_equal_however_ddp_is_used(run_ranks, case: str) -> None:
    run_ranks(compare, 3, case, 2 if case == "compile" else 0.5)  # torch.compile splits at buckets, of at least 1 MB


def test_bitwise_equal_on_two_groups_of_two(run_ranks) -> None:
    run_ranks(compare, 4, "pairs", 0.5)


def accumulated() -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    net, plain = Net(), Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.5)
    optimizer = ZeroAdamW(net.parameters(), **ADAMW)
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    for step in range(2):
        for micro in range(3):
            model(data_of(rank, step, micro), sometimes=True).backward()
            for r in range(world_size):
                plain(data_of(r, step, micro), sometimes=True).backward()
        for param, expected in zip(net.parameters(), (p.grad for p in plain.parameters()), strict=True):
            total = expected / world_size if param.dim() == 0 else torch.zeros_like(expected)
            if param.dim() > 0:
                shard(total, world_size, rank).copy_(shard(expected, world_size, rank))
            torch.testing.assert_close(param.grad, total, rtol=1e-4, atol=1e-6)
        net.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_backwards_without_no_sync_add_up(run_ranks, world_size: int) -> None:
    """The sum of three backwards of all ranks, up to the order in which it is taken (float32, numbers of order 1)."""
    run_ranks(accumulated, world_size)


@on_a_backend(1, 2, 3, 4)
def test_several_backwards_add_up_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    """Where the backend itself adds, in place."""
    run_ranks(accumulated, world_size, transport=transport)


def compare_with_ddp() -> None:
    for case in ("plain", "unused_by_some", "no_sync"):
        for param, value in zip(train(case), train(case, zero=False), strict=True):
            assert torch.equal(param, value)


def test_bitwise_equal_to_ddp_with_adamw_on_two_ranks(run_ranks) -> None:
    """Two addends have one sum in any order, and halving is exact before as after."""
    run_ranks(compare_with_ddp, 2)


def gradients(hook: Any) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    model.register_comm_hook(ZeroAdamW(net.parameters(), **ADAMW), hook)
    for step in range(2):
        of_ranks = []
        for r in range(world_size):
            plain = Net()
            plain(data_of(r, step, 0), sometimes=True).backward()
            of_ranks.append([param.grad for param in plain.parameters()])
        model.zero_grad()
        model(data_of(rank, step, 0), sometimes=True).backward()
        for param, grads in zip(net.parameters(), zip(*of_ranks, strict=True), strict=True):
            if hook is bf16_reduce_scatter_hook:
                grads = [grad.bfloat16().float() for grad in grads]
            total = grads[0]
            for grad in grads[1:]:
                total = total + grad
            expected = torch.zeros_like(param)
            shard(expected, world_size, rank).copy_(shard(total, world_size, rank))
            if param.dim() == 0:
                expected = total / world_size
            assert torch.equal(param.grad, expected)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("hook", [reduce_scatter_hook, bf16_reduce_scatter_hook])
def test_after_backward_the_owner_has_the_sum_and_the_others_zero(run_ranks, hook: Any, world_size: int) -> None:
    """The sum is of float32 gradients, or of ones rounded to bfloat16; of a 0-d parameter all have the mean."""
    run_ranks(gradients, world_size, hook)


def low_precision() -> None:
    torch.manual_seed(0)
    net = nn.Linear(700, 600).bfloat16()
    model = DistributedDataParallel(copy.deepcopy(net), gradient_as_bucket_view=True)
    model.register_comm_hook(ZeroAdamW(model.parameters()), reduce_scatter_hook)
    inputs = [torch.randn(4, 700, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(3)]
    grads = []
    for x in inputs:
        net.zero_grad()
        net(x).sum().backward()
        grads.append(net.weight.grad.float())
    model(inputs[dist.get_rank()]).sum().backward()
    expected = ((grads[0] + grads[1]) + grads[2]).bfloat16()
    assert torch.equal(shard(model.module.weight.grad, 3, dist.get_rank()), shard(expected, 3, dist.get_rank()))


def test_low_precision_gradients_are_summed_in_float32(run_ranks) -> None:
    run_ranks(low_precision, 3)


def uneven(divide: bool, ordered_sums: bool = False) -> list[Tensor]:
    """Rank r has 3 r batches, so that rank 0 has none."""
    results = []
    for zero in (True, False):
        net = Net()
        model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.5)
        options = {"ordered_sums": ordered_sums} if zero else {}
        optimizer: Any = (ZeroAdamW if zero else torch.optim.AdamW)(net.parameters(), **ADAMW, **options)
        if zero:
            model.register_comm_hook(optimizer, reduce_scatter_hook)
        with Join([model, optimizer] if zero else [model], divide_by_initial_world_size=divide):
            for step in range(3 * dist.get_rank()):
                model(data_of(dist.get_rank(), step, 0), sometimes=True).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append([param.detach() for param in net.parameters()])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol={2: 0, 3: 1e-4}.get(dist.get_world_size(), math.inf))
    return results[0]


@pytest.mark.parametrize(
    ("world_size", "transport"),
    [(2, "shared memory"), (3, "shared memory"), (2, "sockets"), *itertools.product([2, 3], BACKENDS)],
)
def test_uneven_inputs_under_join(run_ranks, world_size: int, transport: str) -> None:
    """A rank without inputs updates its pieces all the same; DDP's own result is bitwise equal on two ranks."""
    run_ranks(uneven, world_size, True, transport=transport)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.slow
def test_uneven_inputs_under_join_on_the_code_path_of_nccl(run_ranks, world_size: int) -> None:
    """Bitwise what they are on gloo, with sums in the same order."""
    expected, *_ = run_ranks(uneven, world_size, True, True)
    for found in run_ranks(uneven, world_size, True, True, transport="late backend"):
        assert all(map(torch.equal, found, expected))


def epochs() -> list[Tensor]:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.5)
    optimizer = ZeroAdamW(net.parameters(), **ADAMW)
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    for _ in range(2):
        with Join([model, optimizer]):
            for step in range(4 + dist.get_rank()):
                model(data_of(dist.get_rank(), step, 0), sometimes=True).backward()
                optimizer.step()
                optimizer.zero_grad()
    return [param.detach() for param in net.parameters()]


def test_inputs_come_again_after_join(run_ranks) -> None:
    """In the buckets that the rank had before, whose sums are told from those it got without inputs."""
    for one, other in zip(*run_ranks(epochs, 2), strict=True):
        assert torch.equal(one, other)


def uneven_refused(case: str) -> None:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(net.parameters())
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    if case == "divide":
        with pytest.raises(ValueError, match="divide_by_initial_world_size=False is not supported"):
            Join([model, optimizer], divide_by_initial_world_size=False)
        return
    if case == "clip":
        with Join([model, optimizer]):
            model(data_of(0, 0, 0), sometimes=True).backward()
            with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) asks all ranks, but in Join"):
                optimizer.clip_grad_norm_(1.0)
            with pytest.raises(RuntimeError, match=r"clip_grad_value_\(\) asks all ranks, but in Join"):
                optimizer.clip_grad_value_(1.0)
            scaler = GradScaler("cpu")
            scaler.scale(torch.zeros(()))
            with pytest.raises(RuntimeError, match=r"GradScaler.unscale_\(\) asks all ranks, but in Join"):
                scaler.step(optimizer)
            optimizer.step()
        model(data_of(0, 0, 0), sometimes=True).backward()
        optimizer.clip_grad_norm_(1.0)  # outside again
        return
    if case == "order":
        with pytest.raises(ValueError, match="the model comes first"), Join([optimizer, model]):
            model(data_of(0, 0, 0), sometimes=True).backward()
        return

    def train() -> None:
        with model.join():
            for step in range(1 + dist.get_rank()):
                model(data_of(0, step, 0), sometimes=True).backward()
                optimizer.step()

    with pytest.raises(RuntimeError) as raised:
        train()
    if dist.get_rank() == 0:
        assert "use torch.distributed.algorithms.Join([model, optimizer])" in str(raised.value)
        os._exit(0)
    assert re.search("closed by peer|reset by peer", str(raised.value))


@pytest.mark.parametrize("case", ["divide", "clip", "order"])
def test_join_that_cannot_be_right_is_refused(run_ranks, case: str) -> None:
    run_ranks(uneven_refused, 2, case)


def sums_in_join(zero: bool, accumulate: bool) -> list[Tensor]:
    results = []
    for cls in (ZeroAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(3, 4), gradient_as_bucket_view=True)
        optimizer = cls(model.parameters(), **ADAMW)
        if cls is ZeroAdamW:
            model.register_comm_hook(optimizer, reduce_scatter_hook)
        with Join([model, optimizer] if cls is ZeroAdamW else [model]):
            for step in range(1 + 2 * dist.get_rank()):
                torch.manual_seed(10 * step + dist.get_rank())
                if accumulate:
                    with model.no_sync():
                        model(torch.randn(5, 3)).square().mean().backward()
                model(torch.randn(5, 3)).square().mean().backward()
                optimizer.step()
                if zero or step % 2:
                    optimizer.zero_grad(set_to_none=not step)
        results.append([param.detach() for param in model.parameters()])
    return [one - other for one, other in zip(*results, strict=True)]


def refused_sums_in_join() -> None:
    with pytest.raises(
        RuntimeError, match=r"in Join a backward would add to gradients|rank 1 of the process group failed"
    ):
        sums_in_join(zero=False, accumulate=False)


def test_gradients_that_add_up_in_join_are_refused(run_ranks) -> None:
    """Where DDP's own are neither sum nor mean, as ranks without inputs add nothing for what they had before."""
    run_ranks(refused_sums_in_join, 2)


def sums_around_join(before: int, stepped: bool) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 4), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, **ADAMW)

    def step() -> None:
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()

    for _ in range(before):
        step()
        optimizer.zero_grad()
    model(torch.randn(5, 3)).square().mean().backward()
    if stepped:
        optimizer.step()
    message = r"in Join a backward would add to gradients|rank \d of the process group failed"
    with pytest.raises(RuntimeError, match=message), Join([model, optimizer]):
        step()


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("stepped", [False, True])
def test_sums_from_before_join_are_refused_in_it(run_ranks, before: int, stepped: bool) -> None:
    """Before DDP has rebuilt its buckets, and after."""
    run_ranks(sums_around_join, 2, before, stepped)


def scaled_in_join(scale: str) -> None:
    model = DistributedDataParallel(nn.Linear(3, 4), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, **ADAMW)

    def train() -> None:
        with Join([model, optimizer]):
            for _ in range(1 + 2 * dist.get_rank()):
                model(torch.randn(5, 3)).square().mean().backward()
                optimizer.step()
                for param in model.parameters():
                    {"half": param.grad.mul_, "data": param.grad.data.mul_}[scale](0.5)

    message = r"in Join a backward would add to gradients|rank \d of the process group failed"
    with pytest.raises(RuntimeError, match=message):
        train()


@pytest.mark.parametrize("scale", ["half", "data"])
def test_sums_that_were_scaled_and_not_zeroed_are_refused_in_join(run_ranks, scale: str) -> None:
    run_ranks(scaled_in_join, 2, scale)


def not_in_join() -> None:
    model = DistributedDataParallel(nn.Linear(3, 4), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, **ADAMW)
    for inside in (False, True, False):
        with Join([model, optimizer]) if inside else nullcontext():
            for micro in range(3):
                if inside:
                    optimizer.zero_grad(set_to_none=micro == 1)
                model(torch.randn(5, 3)).square().mean().backward()
                optimizer.step()
        optimizer.zero_grad()


def test_gradients_may_add_up_outside_of_join(run_ranks) -> None:
    run_ranks(not_in_join, 2)


@pytest.mark.parametrize("accumulate", [False, True])
def test_join_with_gradients_zeroed_in_either_way(run_ranks, accumulate: bool) -> None:
    for differences in run_ranks(sums_in_join, 2, True, accumulate):
        assert not any(difference.count_nonzero() for difference in differences)


def test_join_without_the_optimizer_is_refused(run_ranks) -> None:
    """The rank without inputs says so and ends, and with it the others, instead of waiting for it."""
    with pytest.raises(pytest.fail.Exception, match="rank 0:\nthe process died without an answer"):
        run_ranks(uneven_refused, 2, "join", timeout=at_most(20))


def two_optimizers() -> None:
    """Two learning rates by two optimizers over one model: whichever the hook was registered with."""
    results = []
    for cls in (ZeroAdamW, torch.optim.AdamW):
        net = Net()
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        params = list(net.parameters())
        first, second = cls(params[:4], **ADAMW), cls(params[4:], **{**ADAMW, "lr": 1e-3})
        if cls is ZeroAdamW:
            model.register_comm_hook(first, reduce_scatter_hook)
        for step in range(5):
            model(data_of(dist.get_rank(), step, 0), sometimes=True).backward()
            first.step()
            second.step()
            model.zero_grad()
        results.append([param.detach() for param in params])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


def test_two_optimizers_over_one_model(run_ranks) -> None:
    run_ranks(two_optimizers, 2)


def two_clipped_optimizers() -> None:
    """Gradients of one DDP bucket share a version counter: what one optimizer clips is no news to the other."""
    hook.PART_BYTES = 2**18
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    params = list(net.parameters())
    first, second = ZeroAdamW(params[:5], **ADAMW), ZeroAdamW(params[5:], **ADAMW)
    model.register_comm_hook(first, reduce_scatter_hook)
    for step in range(3):
        model(data_of(dist.get_rank(), step, 0), sometimes=True).backward()
        for optimizer in (first, second):
            optimizer.clip_grad_norm_(1e-3)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert all(int(optimizer.state[p]["step"]) == 3 for optimizer in (first, second) for p in optimizer.state)


def test_each_of_two_optimizers_clips_its_own_parameters(run_ranks) -> None:
    run_ranks(two_clipped_optimizers, 2)


def two_models() -> None:
    """Two DDP models, one optimizer and one backward through both, so that their hooks alternate."""
    results = []
    for zero in (True, False):
        nets = [Net(), Net()]
        models = [DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.1) for net in nets]
        params = [param for net in nets for param in net.parameters()]
        optimizer: Any = (ZeroAdamW if zero else torch.optim.AdamW)(params, **ADAMW)
        for model in models:
            if zero:
                model.register_comm_hook(optimizer, reduce_scatter_hook)
        for step in range(4):
            losses = [model(data_of(dist.get_rank(), step, m), sometimes=True) for m, model in enumerate(models)]
            (losses[0] * losses[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach() for param in params])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


def test_two_models_with_one_optimizer(run_ranks) -> None:
    run_ranks(two_models, 2)


def guarded() -> None:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(net.parameters(), **ADAMW)
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    params = list(net.parameters())

    def backward(step: int = 0) -> None:
        optimizer.zero_grad()
        model(data_of(dist.get_rank(), step, 0), sometimes=True).backward()

    def local_backward() -> None:
        with model.no_sync():
            model(data_of(dist.get_rank(), 1, 0), sometimes=True).backward()

    def replace() -> None:
        params[3].grad = params[3].grad.clone()

    edits: list[Callable[[], Any]] = [
        lambda: torch.nn.utils.clip_grad_norm_(params, 1.0),
        lambda: torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=False),
        lambda: torch.nn.utils.clip_grad_value_(params, 1e-3),
        lambda: params[0].grad.mul_(2),
        local_backward,
        replace,
    ]
    backward()
    backward()  # after DDP has rebuilt its buckets
    for edit in edits:
        backward()
        edit()
        before = [param.detach().clone() for param in params]
        for act in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
            with pytest.raises(RuntimeError, match=r"was changed after.*optimizer.clip_grad_norm_\(\).*GradScaler"):
                act()
        assert all(torch.equal(param, b) for param, b in zip(params, before, strict=True))
        assert all(int(optimizer.state[param]["step"]) == 0 for param in params)
    backward()
    sum(float(param.grad.norm()) for param in params)  # reading is free
    copies = [param.grad.clone() for param in params]
    optimizer.step()
    assert all(torch.equal(param.grad, c) for param, c in zip(params, copies, strict=True))
    local_backward()
    model(data_of(dist.get_rank(), 2, 0), sometimes=True).backward()
    optimizer.step()  # accumulation that ends with a synchronising backward


def test_changed_gradients_are_refused_and_nothing_is_changed(run_ranks) -> None:
    run_ranks(guarded, 2)


def misused(case: str) -> None:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=case != "view")
    params = list(net.parameters())
    if case == "held":
        optimizer = ZeroAdamW(params[:-1])
        message = r"a parameter of shape \(5,\) is reduced by reduce_scatter_hook, but no ZeroAdam"
    elif case == "group":
        groups = [dist.new_group([0]), dist.new_group([1])]
        optimizer = ZeroAdamW(params)
        model.register_comm_hook(
            ZeroAdamW([nn.Parameter(torch.zeros(1))], process_group=groups[dist.get_rank()]), reduce_scatter_hook
        )
        message = "no ZeroAdam of the same process group holds it"
    else:
        optimizer = ZeroAdamW(params)
        message = "gradient_as_bucket_view=True"
    if case != "group":
        model.register_comm_hook(optimizer, reduce_scatter_hook)
    with pytest.raises(RuntimeError, match=message):
        model(data_of(0, 0, 0), sometimes=True).backward()


@pytest.mark.parametrize("case", ["view", "held", "group"])
def test_a_hook_that_cannot_be_right_is_refused_in_the_first_backward(run_ranks, case: str) -> None:
    run_ranks(misused, 2, case)


def bounded_staging() -> None:
    model = DistributedDataParallel(
        nn.Sequential(*(nn.Linear(500, 500) for _ in range(120))), gradient_as_bucket_view=True, bucket_cap_mb=2
    )
    optimizer = ZeroAdamW(model.parameters())
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    for _ in range(3):
        model(torch.randn(2, 500)).sum().backward()
        optimizer.step()
        model.zero_grad()
    staging = sum(memory.nbytes for memory in optimizer.reduction.memory.values())
    assert 0 < staging <= 3 * 26 * 2**20 / 2  # this rank's half of three parts; the model has 120 MB
    held = optimizer.reduction.held_bytes()
    assert held == sum(param.nbytes for param in model.parameters())  # none of the buckets before DDP rebuilt them


def other_memory_format(at: int) -> None:
    results = []
    for zero in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 3, 3), nn.Conv2d(3, 5, 1))
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        optimizer: Any = (ZeroAdamW if zero else torch.optim.AdamW)(net.parameters(), **ADAMW)
        if zero:
            model.register_comm_hook(optimizer, reduce_scatter_hook)
        for step in range(4):
            if step == at:
                model.to(memory_format=torch.channels_last)
            torch.manual_seed(10 * step + dist.get_rank())
            model(torch.randn(2, 4, 8, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach() for param in net.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_memory_format_changed_after_ddp_was_built(run_ranks, at: int) -> None:
    """Before DDP rebuilds its buckets, and after, when gradients keep the strides that parameters no longer have."""
    run_ranks(other_memory_format, 2, at)


class Scaled(nn.Module):
    """Matrices and 0-d parameters in turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(128, 128) if i % 2 else torch.randn(()) for i in range(20)])

    def forward(self) -> Tensor:
        return torch.stack([i * weight.square().mean() for i, weight in enumerate(self.weights)]).sum()


def buckets_unknown_to_one_rank() -> Tensor:
    net = Scaled()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.06)
    optimizer = ZeroAdamW(net.parameters(), **ADAMW)
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    for step in range(6):
        if dist.get_rank() == step % 2:  # as if other addresses had been used before on one rank
            for address in list(optimizer.reduction.known)[:1]:
                del optimizer.reduction.known[address]
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([param.detach().view(-1) for param in net.parameters()])


def test_the_order_of_collectives_does_not_depend_on_addresses(run_ranks) -> None:
    one, other = run_ranks(buckets_unknown_to_one_rank, 2, transport="backend")
    assert torch.equal(one, other)


def test_staging_memory_is_bounded(run_ranks) -> None:
    run_ranks(bounded_staging, 2)


def faulty(fault: signal.Signals) -> float:
    group = dist.new_group(timeout=timedelta(seconds=5 if fault == signal.SIGSTOP else 60))
    net = Net()
    model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=True, bucket_cap_mb=0.1)
    optimizer = ZeroAdamW(net.parameters(), process_group=group)
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    for step in range(3):
        if step == 2 and dist.get_rank() == 1:
            net.wide.weight.register_hook(lambda _: os.kill(os.getpid(), fault))  # in the middle of backward
        start = time.monotonic()
        model(data_of(dist.get_rank(), step, 0), sometimes=True).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - start


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.slow
def test_a_rank_killed_or_stopped_in_backward_ends_the_others(run_ranks, fault: signal.Signals) -> None:
    """At once for a dead peer, after the group's timeout of 5 s for a silent one."""
    start = time.monotonic()
    with pytest.raises(
        pytest.fail.Exception, match=r"(has ended|did not come within|closed by peer|reset by peer|[Tt]imed out)"
    ) as raised:
        run_ranks(faulty, 3, fault, timeout=at_most(20), lost=1)
    assert time.monotonic() - start < at_most(8)
    assert "rank 0" in str(raised.value)
    assert "rank 2" in str(raised.value)


class FailsInBackward(torch.autograd.Function):
    now = False

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        if FailsInBackward.now:
            raise MemoryError
        return gradient


def half_a_backward() -> None:
    """DDP itself cannot go on then, but a new one over the same model could."""
    first, second = nn.Linear(40, 40), nn.Linear(40, 40)
    first.register_forward_hook(lambda _, __, output: FailsInBackward.apply(output))
    net = nn.Sequential(first, second)
    optimizer = ZeroAdamW(net.parameters())

    def wrapped() -> DistributedDataParallel:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.001)
        model.register_comm_hook(optimizer, reduce_scatter_hook)
        return model

    model = wrapped()
    for _ in range(3):
        model(torch.ones(2, 40)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    FailsInBackward.now = True
    with pytest.raises(MemoryError):
        model(torch.ones(2, 40)).sum().backward()
    FailsInBackward.now = False
    optimizer.zero_grad()
    model = wrapped()
    with pytest.raises(RuntimeError, match="an earlier backward ended in an error while gradients were being reduced"):
        model(torch.ones(2, 40)).sum().backward()
    with pytest.raises(RuntimeError, match="an earlier call has failed half-way"):
        optimizer.step()


def test_reductions_of_a_backward_that_failed_do_not_end_in_the_next(run_ranks) -> None:
    run_ranks(half_a_backward, 2)
