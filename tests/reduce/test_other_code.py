"""The hook in the company of other people's code: right, or refused with a cure; each against DDP and torch's AdamW."""

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zeroadam
from zeroadam import ZeroAdamW, reduce_scatter_hook
from zeroadam.layout.shard import shard

ADAMW = {"lr": 0.1, "fused": False}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))


def inputs(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    return torch.randint(-4, 4, (2, 8), generator=generator).float()


def wrapped(net: nn.Module, optimizer: Any, hook: bool = True) -> DistributedDataParallel:
    """In DDP, with the hook if that is asked for and the optimizer is ours."""
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    if hook and isinstance(optimizer, ZeroAdamW):
        model.register_comm_hook(optimizer, reduce_scatter_hook)
    return model


def started(cls: Any, hook: bool = True) -> tuple[nn.Sequential, DistributedDataParallel, Any]:
    net = network()
    optimizer = cls(net.parameters(), **ADAMW)
    return net, wrapped(net, optimizer, hook), optimizer


def backward(model: nn.Module, step: int) -> None:
    model(inputs(step)).square().sum().backward()


def same(ours: nn.Module, reference: nn.Module) -> None:
    """DDP divides before it adds, and the hook after, so that the mean of two may differ in the last place."""
    for mine, its in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def skip_nan(hook: bool) -> None:
    trained = []
    for cls in (torch.optim.AdamW, ZeroAdamW):
        net, model, optimizer = started(cls, hook)
        for step in range(5):
            loss = model(inputs(step)).square().sum()
            if step == 2:  # in one element, of which one rank is the owner
                loss = loss + net[0].weight[step + dist.get_rank(), 0] * float("nan")
            elif step == 3:
                loss = loss * float("inf")
            loss.backward()
            finite = all(bool(p.grad.isfinite().all()) for p in net.parameters())
            if cls is ZeroAdamW:
                finite = optimizer.grads_are_finite()
            assert finite == (step not in (2, 3))
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        trained.append(net)
    same(*trained)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_learn_of_a_nan(run_ranks: Any, world_size: int, hook: bool) -> None:
    run_ranks(skip_nan, world_size, hook)


def zero_in_place() -> None:
    trained = []
    for cls in (torch.optim.AdamW, ZeroAdamW):
        net = network()
        first, second = cls(net[0].parameters(), **ADAMW), cls(net[2].parameters(), **ADAMW)
        model = wrapped(net, first)
        for step in range(4):
            backward(model, step)
            first.step()
            first.zero_grad(set_to_none=False)
            second.step()
            second.zero_grad(set_to_none=False)
        trained.append(net)
    same(*trained)
    backward(model, 4)
    net[2].weight.grad.mul_(2)
    first.zero_grad(set_to_none=False)  # which does not make that change one of ours
    with pytest.raises(RuntimeError, match="changed after reduce_scatter_hook"):
        second.step()


def test_an_optimizer_that_zeroes_in_place_does_not_block_another(run_ranks: Any) -> None:
    run_ranks(zero_in_place, 2)


def phases() -> None:
    """With the hook, without it, with it again, without DDP; each time a new optimizer takes the state over."""
    trained = []
    for cls in (torch.optim.AdamW, ZeroAdamW):
        net, state = network(), None
        for phase, hook in enumerate((True, False, True, None)):
            optimizer = cls(net.parameters(), **ADAMW)
            if state is not None:
                optimizer.load_state_dict(state)
            model = net if hook is None else wrapped(net, optimizer, hook)
            for step in range(3):
                backward(model, 3 * phase + step)
                for param in net.parameters() if hook is None else ():
                    param.grad = param.grad.clone()
                    dist.all_reduce(param.grad)
                optimizer.step()
                optimizer.zero_grad()
            state = optimizer.state_dict(**({"sharded": True} if cls is ZeroAdamW else {}))
            del model
        trained.append(net)
    same(*trained)


def test_a_model_goes_on_without_the_hook(run_ranks: Any) -> None:
    run_ranks(phases, 2)


def new_optimizer_in_between() -> None:
    """A new optimizer on a model whose hook goes on, also while gradients are there, still knows what they are."""
    trained = []
    for cls in (torch.optim.AdamW, ZeroAdamW):
        net, model, optimizer = started(cls)
        for step in range(6):
            backward(model, step)
            if step == 2:
                optimizer = cls(net.parameters(), **ADAMW)
            optimizer.step()
            optimizer.zero_grad()
            if step == 4:
                optimizer = cls(net.parameters(), **ADAMW)
        trained.append(net)
    same(*trained)


def test_a_new_optimizer_under_an_old_hook(run_ranks: Any) -> None:
    run_ranks(new_optimizer_in_between, 2)


def compiled_step() -> None:
    trained = []
    for cls in (torch.optim.AdamW, ZeroAdamW):
        net, model, optimizer = started(cls)
        step = torch.compile(optimizer.step, backend="eager") if cls is ZeroAdamW else optimizer.step
        for iteration in range(3):
            backward(model, iteration)
            step()
            optimizer.zero_grad()
        trained.append(net)
    same(*trained)


def test_a_compiled_step(run_ranks: Any) -> None:
    run_ranks(compiled_step, 2)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "normalised": lambda grad: grad.data.mul_(1 / grad.data.norm()),
    "clamped": lambda grad: grad.data.clamp_(-1e-3, 1e-3),
    "noise": lambda grad: grad.data.add_(torch.randn(grad.shape)),
    "set": lambda grad: grad.data.copy_(torch.ones(grad.shape)),
    "detached": lambda grad: grad.detach().mul_(2),
    "numpy": lambda grad: grad.numpy().__imul__(2),
    "plain": lambda grad: grad.mul_(2),
}


def edited(edit: str) -> None:
    """Every parameter alone, on one rank alone as well: the others are then told at once."""
    for index, everywhere in itertools.product(range(4), (True, False)):
        group = dist.new_group()
        net = network()
        optimizer = ZeroAdamW(net.parameters(), process_group=group, **ADAMW)
        model = DistributedDataParallel(net, gradient_as_bucket_view=True, process_group=group)
        model.register_comm_hook(optimizer, reduce_scatter_hook)
        for step in range(3):
            backward(model, step)
            before = [param.detach().clone() for param in net.parameters()]
            if step == 2 and (everywhere or dist.get_rank() == 1):
                EDITS[edit](list(net.parameters())[index].grad)
            if step < 2:
                optimizer.step()
                optimizer.zero_grad()
                continue
            if everywhere or dist.get_rank() == 1:
                with pytest.raises(RuntimeError, match="was changed after reduce_scatter_hook summed it"):
                    optimizer.step()
                assert all(map(torch.equal, net.parameters(), before))
            else:
                with pytest.raises(RuntimeError, match=r"rank 1 of the process group refused step\(\) 3"):
                    optimizer.step()


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_gradients_are_refused(run_ranks: Any, edit: str) -> None:
    run_ranks(edited, 2, edit)


def one_element() -> None:
    """With all values compared, none passes; a thousandth of them find what changes at least so many."""
    os.environ["ZEROADAM_CHECK_GRADIENTS"] = "all"
    net = nn.Linear(64, 64)
    optimizer = ZeroAdamW(net.parameters(), **ADAMW)
    model = wrapped(net, optimizer)
    model(torch.ones(1, 64)).sum().backward()
    mine = shard(net.weight.grad, dist.get_world_size(), dist.get_rank())
    for element in range(mine.numel()):
        before = mine.data.view(-1)[element].clone()
        mine.data.view(-1)[element] += 1
        with pytest.raises(RuntimeError, match="was changed after"):
            optimizer.clip_grad_value_(1.0)
        mine.data.view(-1)[element] = before
    optimizer.clip_grad_value_(1.0)


def test_a_single_element_if_all_are_compared(run_ranks: Any) -> None:
    run_ranks(one_element, 2)


def clipped(hook: bool, kind: float | str) -> None:
    """Two optimizers over one model, clipped by the norm of both together, or by value."""
    trained, expected = [], []
    for cls in (torch.optim.AdamW, ZeroAdamW):
        net = network()
        both = [cls(net[0].parameters(), **ADAMW), cls(net[2].parameters(), **ADAMW)]
        model = wrapped(net, both[0], hook)
        for step in range(4):
            backward(model, step)
            if cls is ZeroAdamW and kind == "value":
                zeroadam.clip_grad_value_(both, 0.3)
            elif cls is ZeroAdamW:
                norm = zeroadam.clip_grad_norm_(both, 0.1, kind)
                torch.testing.assert_close(norm, expected[step])
            elif kind == "value":
                torch.nn.utils.clip_grad_value_(net.parameters(), 0.3)
            else:
                expected.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, kind))
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
        trained.append(net)
    same(*trained)


@pytest.mark.parametrize("kind", [2.0, 1.0, float("inf"), "value"])
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_optimizers_are_clipped_together(run_ranks: Any, world_size: int, hook: bool, kind: float | str) -> None:
    run_ranks(clipped, world_size, hook, kind)


def one_line() -> None:
    """The model in place of its parameters: names, process group and hook come with it."""
    trained = []
    for cls in (torch.optim.AdamW, ZeroAdamW):
        net = network()
        model = DistributedDataParallel(net, gradient_as_bucket_view=True, process_group=dist.new_group())
        optimizer = cls(model if cls is ZeroAdamW else model.parameters(), **ADAMW)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(net)
    same(*trained)
    assert optimizer.reduction.used
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
    assert optimizer.process_group is model.process_group
    with pytest.raises(RuntimeError, match=r"so pass hook=None: .*once"):
        ZeroAdamW(model)
    with pytest.raises(RuntimeError, match="another process group than the optimizer"):
        ZeroAdamW(DistributedDataParallel(network(), gradient_as_bucket_view=True), process_group=model.process_group)
    ZeroAdamW(model, hook=None)
    assert not ZeroAdamW(network()).reduction.used
    with pytest.warns(UserWarning, match="gradient_as_bucket_view=True"):
        ZeroAdamW(DistributedDataParallel(network()))


def test_a_model_in_place_of_parameters(run_ranks: Any) -> None:
    run_ranks(one_line, 2)


class Quantized(Tensor):
    """A weight in 8 bits that can do nothing but be held, as those of torchao."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> "Quantized":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].codes)
        raise NotImplementedError(function)


def frozen_subclass() -> None:
    frozen = nn.Parameter(Quantized(torch.ones(8, 8, dtype=torch.int8)), requires_grad=False)
    net = network()
    optimizer = ZeroAdamW([frozen, *net.parameters()], **ADAMW)
    reference = torch.optim.AdamW((copied := network()).parameters(), **ADAMW)
    for param, its in zip(net.parameters(), copied.parameters(), strict=True):
        param.grad, its.grad = torch.ones_like(param), torch.ones_like(its)
    for one in (optimizer, reference):
        one.step()
    assert all(map(torch.equal, net.parameters(), copied.parameters()))
    optimizer.load_state_dict(optimizer.state_dict(sharded=True))


def test_a_frozen_weight_of_a_tensor_subclass(run_ranks: Any) -> None:
    run_ranks(frozen_subclass, 2)
