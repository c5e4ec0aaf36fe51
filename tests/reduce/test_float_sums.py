"""grad_dtype=torch.float32: float32 AdamW on copies of the parameters, fed sums of the bfloat16 gradients in float32.

The reference is one process with a plain copy of the model. It takes the gradients of each rank and each micro-batch
alone, adds them in float32, ranks in their order and then micro-batches in theirs, and divides by W.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adam_reference import full
from commands import ROOT
from master_reference import WAYS, master_of, rounded
from placed import HOOKS, sum_over
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from zeroadam import GradScaler, ZeroAdamW, reduce_scatter_hook
from zeroadam.layout.shard import shard
from zeroadam.reduce.float_sums import sum_of

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
    return [[0, 1, 2]] if case.startswith("no_sync") else [[0], [1], [2]]


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
        for one, total in zip(copies, totals, strict=True):
            one.grad = None if total is None else (total / world_size).to(one.dtype)
        optimizer.step()
        with torch.no_grad():
            for param, one in zip(params, copies, strict=True):
                param.copy_(rounded(one.detach(), param, way))
        found.append([one.detach().clone() for one in copies])
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
    }.get(case.removeprefix("no_sync, "), optimizer.zero_grad)


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
    found = train(case, hook, dtype, way, shape, options)
    placement = placement or "a" * dist.get_world_size()
    expected = [reference(placement, case, hook, dtype, way) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(expected)
    for step, (mine, its) in enumerate(zip(found, expected[0], strict=True)):
        for i, (one, other) in enumerate(zip(mine, its, strict=True)):
            assert torch.equal(one, other), (step, i)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("transport", ["shared memory", "sockets", "backend", "late backend"])
@pytest.mark.parametrize("hook", ["same", "bfloat16"])
def test_bitwise_float32_adamw_fed_sums_in_float32(run_ranks: Any, hook: str, transport: str, world_size: int) -> None:
    run_ranks(compare, world_size, "plain", hook, torch.bfloat16, "master", transport=transport)


CASES = ["no_sync", "unused", "zero", "module_none", "module_zero", "by hand", "data", "never", "skip"]
CASES += ["no_sync, zero", "no_sync, module_zero", "no_sync, by hand", "no_sync, data"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_bitwise_however_gradients_are_zeroed_and_accumulate(run_ranks: Any, case: str) -> None:
    run_ranks(compare, 3, case, "same", torch.bfloat16, "master")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["", "remainder", "master"])
def test_bitwise_with_and_without_masters(run_ranks: Any, way: str, dtype: torch.dtype) -> None:
    """Without, Adam gets the mean gradient, rounded once."""
    run_ranks(compare, 3, "plain", "same", dtype, way)


@pytest.mark.parametrize("hook", ["same", "bfloat16"])
@pytest.mark.parametrize("placement", ["aabb", "abb", "abab"])
@pytest.mark.slow
def test_bitwise_between_hosts(run_ranks: Any, placement: str, hook: str) -> None:
    """In the order of the ranks of a host, then of the hosts."""
    run_ranks(compare, len(placement), "plain", hook, torch.bfloat16, "master", placement, hosts=placement)


@pytest.mark.parametrize("hosts", ["", "aabb", "abab"])
@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (1, 2)], ids=str)
@pytest.mark.slow
def test_bitwise_with_hybrid_sharding(run_ranks: Any, shape: tuple[int, int], hosts: str) -> None:
    """In the order of the ranks of a shard group, then of the groups."""
    groups = "".join(name * shape[1] for name in "ab"[: shape[0]])
    world_size = shape[0] * shape[1]
    for case in ("plain", "unused"):
        run_ranks(
            *(compare, world_size, case, "same", torch.bfloat16, "master", groups, shape), hosts=hosts[:world_size]
        )


def built(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[nn.Module, ZeroAdamW, list[Tensor]]:
    model = DistributedDataParallel(Net(dtype), gradient_as_bucket_view=True, bucket_cap_mb=0.2)
    optimizer = ZeroAdamW(model, **{**ADAMW, **WAYS["master"]}, grad_dtype=torch.float32, **options)
    return model, optimizer, list(model.parameters())


def backward(model: nn.Module, step: int, micro: int, scale: float = 1.0) -> None:
    (model(*batch_of(dist.get_rank(), step, micro, torch.bfloat16), sometimes=True) * scale).backward()


def sums_of(micros: Sequence[int], step: int = 0) -> list[Tensor]:
    """Of all ranks and some micro-batches: [d0, ...] float32, for each parameter."""
    net = Net(torch.bfloat16)
    totals: list[Any] = [None] * len(list(net.parameters()))
    for micro in micros:
        of_ranks = []
        for rank in range(dist.get_world_size()):
            net.zero_grad()
            net(*batch_of(rank, step, micro, torch.bfloat16), sometimes=True).backward()
            of_ranks.append([p.grad for p in net.parameters()])
        for i, grads in enumerate(zip(*of_ranks, strict=True)):
            total = sum_over("a" * len(grads), list(grads), exact=True)
            totals[i] = total if totals[i] is None else totals[i] + total
    return totals


def held(param: Tensor) -> Tensor:
    found = sum_of(param)
    assert found is not None
    return found.total


def shown() -> None:
    """After each backward: the sum itself, [c, ...], and in p.grad its rounding, zero elsewhere, the mean in 0-d."""
    model, optimizer, params = built()
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for step in range(2):
        for micro in range(4):
            backward(model, step, micro)
            if step == 0:
                for param, total in zip(params, sums_of(range(micro + 1)), strict=True):
                    own = shard(total, world_size, rank)
                    assert torch.equal(held(param), own)
                    expected = torch.zeros_like(param.grad)
                    shard(expected, world_size, rank).copy_(own)
                    if param.dim() == 0:
                        expected /= world_size
                    assert torch.equal(param.grad, expected)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.report().sums == sum(4 * shard(p, world_size, rank).numel() for p in params)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_p_grad_shows_the_sum_rounded(run_ranks: Any, world_size: int) -> None:
    run_ranks(shown, world_size)


def looked_at(world_size: int) -> None:
    """Norm, clipping and loss scaling, also between two backwards, on sums that are no bfloat16."""
    model, optimizer, params = built()
    rank = dist.get_rank()
    backward(model, 0, 0)
    backward(model, 0, 1)
    totals = sums_of([0, 1])
    norm = torch.stack([(total / world_size).norm() for total in totals]).norm()
    for factor, max_norm in ((1.0, 1e6), (0.5, 0.5 * float(norm))):
        torch.testing.assert_close(optimizer.clip_grad_norm_(max_norm), norm, rtol=1e-5, atol=0)
        for param, total in zip(params, totals, strict=True):
            own = shard(total, world_size, rank) * factor
            torch.testing.assert_close(held(param), own, rtol=2e-5, atol=0)
            assert torch.equal(shard(param.grad, world_size, rank) * 1, held(param).to(param.dtype)) or (
                param.dim() == 0
            )
    backward(model, 0, 2)  # goes on from the clipped sum
    for param, total, more in zip(params, totals, sums_of([2]), strict=True):
        own = shard(total * 0.5 + more, world_size, rank)
        torch.testing.assert_close(held(param), own, rtol=1e-3, atol=1e-5)
    most = max(float(total.abs().max()) for total in sums_of([0])) / world_size
    optimizer.zero_grad()
    backward(model, 0, 0)
    optimizer.clip_grad_value_(most / 2)
    for param, total in zip(params, sums_of([0]), strict=True):
        own = shard(total, world_size, rank).clamp(-most / 2 * world_size, most / 2 * world_size)
        torch.testing.assert_close(held(param), own)
    assert optimizer.grads_are_finite()
    optimizer.step()
    optimizer.zero_grad()
    if rank == world_size - 1:
        params[2].register_hook(lambda grad: grad.fill_(torch.inf))
    backward(model, 1, 0)
    assert not optimizer.grads_are_finite()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_looks_at_gradients_looks_at_the_sums(run_ranks: Any, world_size: int) -> None:
    run_ranks(looked_at, world_size, world_size)


def scaled() -> None:
    """Powers of two change nothing: the steps of a scaled run are those of one that is not, to the bit."""
    results = []
    for scaling in (False, True):
        model, optimizer, params = built()
        scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaling)
        for step in range(4):
            for micro in range(2):
                loss = model(*batch_of(dist.get_rank(), step, micro, torch.bfloat16), sometimes=True)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(2.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(int(optimizer.state[p]["step"]) == 4 for p in params)
        results.append([master_of(optimizer, param) for param in params])
    assert all(map(torch.equal, *results))


def small_moments(state_dtype: torch.dtype) -> None:
    """As the same optimizer on float32 copies, given the mean of the float32 sums."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(600, 512), nn.ReLU(), nn.Linear(512, 1024)).bfloat16()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.2)
    optimizer = ZeroAdamW(model, **ADAMW, **WAYS["master"], grad_dtype=torch.float32, state_dtype=state_dtype)
    params, world_size, rank = list(net.parameters()), dist.get_world_size(), dist.get_rank()
    copies = [nn.Parameter(param.detach().float()) for param in params]
    other = ZeroAdamW(copies, **ADAMW, state_dtype=state_dtype)
    for step in range(STEPS):
        for micro in range(MICROS):
            _, x = batch_of(rank, step, micro, torch.bfloat16)
            model(x).square().mean().backward()
        for param, one in zip(params, copies, strict=True):
            one.grad = torch.zeros_like(one)
            shard(one.grad, world_size, rank).copy_(held(param) / world_size)
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        for param, one in zip(params, copies, strict=True):
            assert torch.equal(master_of(optimizer, param), one)
            for key, value in other.state[one].items():
                assert key == "step" or torch.equal(full(optimizer.state[param][key]), full(value)), key
    assert any(value.dtype == state_dtype for entry in optimizer.state.values() for value in entry.values())


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_bitwise_with_moments_of_fewer_bits(run_ranks: Any, state_dtype: torch.dtype) -> None:
    run_ranks(small_moments, 2, state_dtype)


def thawed(micros: list[int]) -> None:
    """A layer that was frozen while DDP laid out its buckets, and is trained in some backwards of the next step."""
    net = Net(torch.bfloat16)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.2, find_unused_parameters=True)
    optimizer = ZeroAdamW(model, lr=0.0, master_dtype=torch.float32, grad_dtype=torch.float32)
    for step in range(2):
        for micro in range(MICROS):
            net.narrow.requires_grad_(step == 1 and micro in micros)
            backward(model, step, micro)
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    for (name, param), total, part in zip(
        net.named_parameters(), sums_of(range(MICROS), 1), sums_of(micros, 1), strict=True
    ):
        expected = part if name.startswith("narrow") else total
        assert torch.equal(held(param), shard(expected, dist.get_world_size(), dist.get_rank())), name


@pytest.mark.parametrize("micros", [[0, 1, 2], [1, 2], [2]], ids=str)
def test_a_layer_may_be_thawed_at_any_time(run_ranks: Any, micros: list[int]) -> None:
    run_ranks(thawed, 2, micros)


def zeroed_by_hand() -> None:
    """Where nearly all is zero, the few values that are compared do not tell that the rest has been zeroed."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Embedding(2000, 8).bfloat16(), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, **WAYS["master"], grad_dtype=torch.float32)
    (param,) = model.parameters()
    for step in range(4):
        rows = torch.tensor([3 + step, 1501 + step])
        model(rows).sum().backward()
        expected = torch.zeros(2000, 8)
        expected[rows] = 2.0
        assert torch.equal(held(param), shard(expected, 2, dist.get_rank()))
        optimizer.step()
        param.grad.data.zero_()


def test_zeroing_by_hand_is_seen_where_most_is_zero(run_ranks: Any) -> None:
    run_ranks(zeroed_by_hand, 2)


def test_loss_scaling_changes_nothing(run_ranks: Any) -> None:
    run_ranks(scaled, 2)


def used_between() -> None:
    """torch.autograd.grad, which adds to no p.grad, and a checkpoint leave a sum alone that is under way."""
    results = []
    for disturbed in (False, True):
        model, optimizer, params = built()
        for step in range(3):
            for micro in range(3):
                backward(model, step, micro)
                if disturbed:
                    before = [param.grad.clone() for param in params]
                    loss = model.module(*batch_of(0, step, 8, torch.bfloat16), sometimes=True)
                    assert any(grad.any() for grad in torch.autograd.grad(loss, params))
                    assert all(torch.equal(param.grad, b) for param, b in zip(params, before, strict=True))
                    saved = optimizer.state_dict(sharded=True)
                    optimizer.load_state_dict(copy.deepcopy(saved))
                    assert not {key for entry in saved["state"].values() for key in entry} & {"grad", "sum"}
            optimizer.step()
            optimizer.zero_grad()
        results.append([master_of(optimizer, param) for param in params])
    assert all(map(torch.equal, *results))


def test_autograd_grad_and_checkpoints_in_an_accumulation(run_ranks: Any) -> None:
    run_ranks(used_between, 2)


def without(case: str) -> None:
    """Raises on every rank and changes nothing."""
    net = Net(torch.bfloat16)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(net.parameters(), **ADAMW, grad_dtype=torch.float32)
    if case == "others":  # whose gradients of these parameters it takes otherwise
        model.register_comm_hook(ZeroAdamW(net.parameters(), **ADAMW), reduce_scatter_hook)
    before = [param.detach().clone() for param in net.parameters()]
    backward(model, 0, 0)
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0), optimizer.grads_are_finite):
        with pytest.raises(RuntimeError, match=r"was not summed in torch.float32, .* model.register_comm_hook"):
            call()
    assert all(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("case", ["none", "others"])
def test_gradients_that_no_hook_has_summed_in_float32_are_refused(run_ranks: Any, case: str) -> None:
    run_ranks(without, 2, case)


def test_it_is_refused_without_a_group() -> None:
    model = nn.Linear(3, 3).bfloat16()
    optimizer = ZeroAdamW(model.parameters(), grad_dtype=torch.float32)
    model(torch.ones(1, 3).bfloat16()).sum().backward()
    with pytest.raises(RuntimeError, match=r"was not summed in torch\.float32"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"grad_dtype is torch\.float32 or None, not torch\.bfloat16"):
        ZeroAdamW(model.parameters(), grad_dtype=torch.bfloat16)


def changed(case: str) -> None:
    """On one rank alone; all raise, and none waits for ever."""
    model, _, params = built()
    backward(model, 0, 0)
    if case == "rebuilt":
        backward(model, 0, 1)
    if dist.get_rank() == 1 and case == "data":
        params[2].grad.data.mul_(0.5)
    elif dist.get_rank() == 1:
        params[2].grad = params[2].grad * 0.5
    message = r"(was changed between two backwards.*optimizer.zero_grad\(\)|rank 1 of the process group)"
    with pytest.raises(RuntimeError, match=message):
        backward(model, 0, 2)


@pytest.mark.parametrize("case", ["first", "rebuilt", "data"])
def test_gradients_changed_between_two_backwards_are_refused(run_ranks: Any, case: str) -> None:
    run_ranks(changed, 2, case)


def local_after_sum(clear: bool) -> None:
    model, optimizer, params = built()
    backward(model, 0, 0)
    backward(model, 0, 1)
    with model.no_sync():
        backward(model, 0, 2)
    with pytest.raises(RuntimeError, match=r"end accumulation with a backward outside of no_sync"):
        optimizer.step()
    if clear:
        optimizer.zero_grad()
        backward(model, 0, 3)
        assert all(
            torch.equal(held(p), shard(total, 2, dist.get_rank()))
            for p, total in zip(params, sums_of([3]), strict=True)
        )
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match=r"takes no backward in no_sync|of the process group"):
        backward(model, 0, 3)


@pytest.mark.parametrize("clear", [False, True])
def test_a_local_backward_behind_a_reduced_one_is_refused_unless_zeroed(run_ranks: Any, clear: bool) -> None:
    run_ranks(local_after_sum, 2, clear)


def guarded() -> None:
    model, optimizer, params = built()
    edits: list[Callable[[], Any]] = [
        lambda: torch.nn.utils.clip_grad_norm_(params, 1e-3),
        lambda: params[0].grad.mul_(2),
        lambda: [param.grad.data.mul_(0) for param in params],
    ]
    before = [param.detach().clone() for param in params]
    for edit in edits:
        backward(model, 0, 0)
        backward(model, 0, 1)
        edit()
        with pytest.raises(RuntimeError, match=r"was changed after.*optimizer.clip_grad_norm_\(\)"):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        optimizer.zero_grad()
    backward(model, 0, 0)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # as torch's AdamW, with gradients of zero
    assert all(not optimizer.state[p]["exp_avg"].to_local().any() for p in params)


def test_changes_before_a_step_are_refused(run_ranks: Any) -> None:
    run_ranks(guarded, 2)


def bytes_per_parameter() -> float:
    """Of state and sums on this rank, of the tensors that are alive."""
    model = DistributedDataParallel(nn.Linear(512, 256).bfloat16(), gradient_as_bucket_view=True)
    optimizer, params = ZeroAdamW(model, **WAYS["master"], grad_dtype=torch.float32), list(model.parameters())
    for _ in range(2):
        model(torch.ones(2, 512).bfloat16()).sum().backward()
    optimizer.step()
    state = [v.to_local() for p in params for v in optimizer.state[p].values() if isinstance(v, DTensor)]
    totals = [held(param) for param in params]
    assert optimizer.report().sums == sum(total.untyped_storage().nbytes() for total in totals)
    return sum(tensor.nbytes for tensor in (*state, *totals)) / sum(p.numel() for p in params)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_per_parameter_are_those_of_the_readme(run_ranks: Any, world_size: int) -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    row = next(line for line in readme if line.startswith("| ") and "`grad_dtype=torch.float32`" in line)
    expected = row.split("|")[{1: 2, 2: 3, 4: 4}[world_size]].strip()
    assert {f"{found:.3g} N" for found in run_ranks(bytes_per_parameter, world_size)} == {expected}


def uneven(micros: int) -> list[Tensor]:
    """Rank 1 has twice the batches of rank 0, which then owns sums of the other's gradients alone."""
    model, optimizer, params = built()
    with Join([model, optimizer]):
        for step in range(2 + 2 * dist.get_rank()):
            for micro in range(micros):
                with model.no_sync() if micro < micros - 1 else nullcontext():
                    backward(model, step, micro)
            optimizer.step()
            if step != 1 or dist.get_rank() == 1:  # on rank 0 the last gradients stay
                optimizer.zero_grad(set_to_none=step == 0)
    return [master_of(optimizer, param) for param in params]


def expected_when_uneven(micros: int) -> list[Tensor]:
    net = Net(torch.bfloat16)
    copies = [nn.Parameter(p.detach().float()) for p in net.parameters()]
    optimizer = torch.optim.AdamW(copies, **ADAMW)
    for step in range(4):
        of_ranks = []
        for rank in range(2):
            net.zero_grad()
            for micro in range(micros if step < 2 or rank == 1 else 0):
                net(*batch_of(rank, step, micro, torch.bfloat16), sometimes=True).backward()
            of_ranks.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
        for one, grads in zip(copies, zip(*of_ranks, strict=True), strict=True):
            one.grad = sum_over("aa", list(grads), exact=True) / 2
        optimizer.step()
        with torch.no_grad():
            for param, one in zip(net.parameters(), copies, strict=True):
                param.copy_(one)
    return [one.detach() for one in copies]


@pytest.mark.parametrize("transport", ["shared memory", "sockets", "late backend"])
@pytest.mark.parametrize("micros", [1, 2])
def test_bitwise_in_join(run_ranks: Any, micros: int, transport: str) -> None:
    expected = expected_when_uneven(micros)
    for found in run_ranks(uneven, 2, micros, transport=transport):
        assert all(map(torch.equal, found, expected))


def added_up_in_join() -> None:
    model, optimizer, _ = built()

    def train() -> None:
        with Join([model, optimizer]):
            for step in range(1 + 2 * dist.get_rank()):
                backward(model, step, 0)
                optimizer.step()

    with pytest.raises(RuntimeError, match=r"in Join a backward would add to gradients|rank \d of the process group"):
        train()


def test_sums_that_go_on_in_join_are_refused(run_ranks: Any) -> None:
    run_ranks(added_up_in_join, 2)


def regrouped() -> None:
    """Parameters that move between two optimizers and their groups in an accumulation take their sums with them."""
    results = []
    for moves in (False, True):
        model = DistributedDataParallel(Net(torch.bfloat16), gradient_as_bucket_view=True, bucket_cap_mb=0.2)
        params, options = list(model.parameters()), {**ADAMW, **WAYS["master"], "grad_dtype": torch.float32}
        groups = [{"params": params[:4]}, {"params": params[4:7], "weight_decay": 0.0}]
        first, second = ZeroAdamW(groups, **options), ZeroAdamW(params[7:], **options)
        model.register_comm_hook(first, reduce_scatter_hook)
        for step in range(3):
            backward(model, step, 0)
            if moves and step == 1:
                given = first.param_groups[0]["params"].pop()
                second.param_groups[0]["params"].append(given)
                second.state[given] = first.state.pop(given)
                first.param_groups[0]["params"].append(first.param_groups[1]["params"].pop())
                first.param_groups[0]["weight_decay"] = 0.1
            backward(model, step, 1)
            first.clip_grad_norm_(1e9)
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
            if step == 1:
                break
        results.append([master_of(second if param in second.state else first, param) for param in params])
    moved = 6  # to the group with weight decay
    assert all(torch.equal(one, other) for i, (one, other) in enumerate(zip(*results, strict=True)) if i != moved)
    assert not torch.equal(results[0][moved], results[1][moved])


def test_edited_groups(run_ranks: Any) -> None:
    run_ranks(regrouped, 2)


def reformatted(at: int) -> list[Tensor]:
    """Another memory format between two backwards, which DDP's buckets may not have."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 80, 3), nn.Conv2d(80, 300, 3), nn.Conv2d(300, 5, 1)).bfloat16()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, **ADAMW, **WAYS["master"], grad_dtype=torch.float32)
    for count in range(6):
        if count == at:
            model.to(memory_format=torch.channels_last)
        torch.manual_seed(10 * count + dist.get_rank())
        model(torch.randn(2, 4, 8, 8).bfloat16()).square().sum().backward()
        if count % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [held(param).contiguous() for param in net.parameters()]


def reformatted_alike(at: int) -> None:
    for one, other in zip(reformatted(at), reformatted(-1), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()) if other.numel() else 0)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_memory_format_changed_between_two_backwards(run_ranks: Any, at: int) -> None:
    """Kernels round otherwise in another format, so sums are alike to 5 % only: those in a wrong order are not."""
    run_ranks(reformatted_alike, 2, at)
