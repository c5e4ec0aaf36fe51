"""The numbers are torch.optim.Adam's: parameters and state after 20 steps fed the same mean gradients.

With `fused=False` and `foreach=True` this is to the bit, whatever W is: torch's arithmetic there does not depend on
where in memory an element lies. The fused CPU kernel rounds the last few elements of a run of memory (those that do
not fill a vector register) otherwise than the rest, and cutting a tensor changes which those are; each such rounding is
within one unit in the last place of a moment, which is the stated bound for it. So is that of `grad.add(param,
alpha=weight_decay)` in bfloat16 and float16, which is why coupled weight decay is tested on the other dtypes.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adam_reference import assert_same, assert_same_on_all_ranks, dense, parameters, set_gradients, train_both
from on_a_backend import on_a_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zeroadam import ZeroAdam, ZeroAdamW
from zeroadam.gather.param_bucket import STAGING_SLOTS


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [{"fused": False}, {"foreach": True}], ids=["single", "foreach"])
@pytest.mark.parametrize("cls", [ZeroAdam, ZeroAdamW])
def test_bitwise_equal_to_torch(run_ranks, cls: type[ZeroAdam], kernel: dict[str, Any], world_size: int) -> None:
    run_ranks(train_both, world_size, cls, kernel)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"maximize": True}, {"amsgrad": True, "maximize": True}], ids=str
)
@pytest.mark.parametrize("kernel", [{"fused": False}, {"foreach": True}], ids=["single", "foreach"])
def test_bitwise_equal_to_torch_with_options(
    run_ranks, kernel: dict[str, Any], options: dict[str, Any], world_size: int
) -> None:
    run_ranks(train_both, world_size, ZeroAdamW, {**kernel, **options})


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}], ids=str)
def test_fused_is_equal_up_to_the_rounding_of_the_kernel(run_ranks, options: dict[str, Any], world_size: int) -> None:
    """Relative 1e-5, absolute 1e-6 after 20 steps of lr 1e-2: some units in the last place of float32."""
    run_ranks(train_both, world_size, ZeroAdamW, {"fused": True, **options}, 1e-5, 1e-6)


@on_a_backend(1, 2, 3, 4)
@pytest.mark.slow
def test_bitwise_equal_to_torch_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    run_ranks(train_both, world_size, ZeroAdamW, {"foreach": True}, transport=transport)


def defaults() -> None:
    param = nn.Parameter(torch.ones(4))
    assert ZeroAdam([param]).param_groups[0]["fused"] is True
    assert ZeroAdam([param], foreach=True).param_groups[0]["fused"] is None
    assert ZeroAdam([param], fused=False).param_groups[0]["fused"] is False
    ours, plain = ZeroAdamW([param]).param_groups[0], torch.optim.AdamW([param]).param_groups[0]
    assert {**ours, "fused": None} == plain
    assert {**ZeroAdam([param]).param_groups[0], "fused": None} == torch.optim.Adam([param]).param_groups[0]


def test_defaults_are_those_of_torch_with_the_fused_kernel(run_ranks) -> None:
    run_ranks(defaults, 1)


def tensor_lr() -> None:
    for options, bound in (({"fused": False}, (0.0, 0.0)), ({"fused": True}, (1e-5, 1e-6))):
        mine, theirs = parameters(), dense(parameters())
        ours = ZeroAdamW(mine, lr=torch.tensor(1e-2), eps=1e-6, **options)
        plain = torch.optim.AdamW(theirs, lr=torch.tensor(1e-2), eps=1e-6, **options)
        for step in range(3):
            for optimizer in (ours, plain):
                optimizer.param_groups[0]["lr"].mul_(0.5)
            set_gradients(step, mine, theirs)
            ours.step()
            plain.step()
        assert_same(ours, plain, *bound)


def test_learning_rate_may_be_a_tensor(run_ranks) -> None:
    run_ranks(tensor_lr, 2)


def re_pointed() -> None:
    """`p.data = ...`, as in swapping weights for their averages."""
    mine, theirs = dense(parameters()), dense(parameters())
    ours = ZeroAdamW(mine, lr=1e-2, eps=1e-6, fused=False)
    plain = torch.optim.AdamW(theirs, lr=1e-2, eps=1e-6, fused=False)
    for step in range(4):
        for param in (*mine, *theirs):
            param.data = param.data + 1 if step == 2 else param.data.clone()
        set_gradients(step, mine, theirs)
        ours.step()
        plain.step()
    assert_same(ours, plain)


def test_parameters_may_move_in_memory(run_ranks) -> None:
    run_ranks(re_pointed, 2)


def closure_and_hooks() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    reference = copy.deepcopy(model)
    ours, plain = ZeroAdam(model.parameters(), fused=False), torch.optim.Adam(reference.parameters(), fused=False)
    calls: list[str] = []
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))
    ours.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mine": 1})
    ours.register_load_state_dict_pre_hook(
        lambda _, state_dict: {k: v for k, v in state_dict.items() if calls.append("load") or k != "mine"}
    )

    def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(3)).square().sum()
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        assert torch.equal(ours.step(closure_of(model, ours)), plain.step(closure_of(reference, plain)))
    assert_same(ours, plain)
    assert calls == ["before", "after"] * 3
    state_dict = ours.state_dict(sharded=True)
    assert state_dict["mine"] == 1
    ours.load_state_dict(state_dict)
    assert "load" in calls
    assert_same(ours, plain)


def test_closures_and_hooks_are_called(run_ranks) -> None:
    run_ranks(closure_and_hooks, 2)


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda s, o: s.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda s, o: s.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda s, o: s.StepLR(o, 3),
    "MultiStepLR": lambda s, o: s.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda s, o: s.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda s, o: s.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda s, o: s.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda s, o: s.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda s, o: s.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda s, o: s.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda s, o: s.CyclicLR(o, 1e-4, 1e-2, 3),  # changes betas
    "OneCycleLR": lambda s, o: s.OneCycleLR(o, 1e-2, total_steps=12),  # changes betas
    "SequentialLR": lambda s, o: s.SequentialLR(o, [s.ConstantLR(o), s.ExponentialLR(o, 0.9)], [4]),
    "ChainedScheduler": lambda s, o: s.ChainedScheduler([s.ConstantLR(o), s.ExponentialLR(o, 0.9)]),
    "SWALR": lambda _, o: torch.optim.swa_utils.SWALR(o, 1e-3, 3),
}


def scheduled() -> None:
    for name, make in SCHEDULERS.items():
        mine, theirs = parameters()[:5], parameters()[:5]
        ours = ZeroAdamW(mine, lr=1e-2, eps=1e-6, fused=False)
        plain = torch.optim.AdamW(theirs, lr=1e-2, eps=1e-6, fused=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedulers = [make(torch.optim.lr_scheduler, optimizer) for optimizer in (ours, plain)]
            rates, betas = set(), set()
            for step in range(8):
                set_gradients(step, mine, theirs)
                for optimizer, scheduler in zip((ours, plain), schedulers, strict=True):
                    optimizer.step()
                    scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                assert ours.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
                rates.add(ours.param_groups[0]["lr"])
                betas.add(ours.param_groups[0]["betas"])
        assert not [w for w in caught if "optimizer.step()" in str(w.message)]  # the schedulers see our steps
        assert len(rates) > 1, name
        assert (len(betas) > 1) == (name in ("CyclicLR", "OneCycleLR")), name
        assert_same(ours, plain)


def test_every_scheduler_of_torch_drives_it(run_ranks) -> None:
    every = {
        name
        for name, value in vars(torch.optim.lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, torch.optim.lr_scheduler.LRScheduler) and name[0] != "_"
    }
    assert every - {"LRScheduler"} <= set(SCHEDULERS)
    run_ranks(scheduled, 2)


def growing() -> None:
    """One group from the start, one added after three steps, and one whose parameters thaw after six."""
    mine, theirs = parameters(), parameters()
    for params in (mine, theirs):
        for param in params[4:8]:
            param.requires_grad_(False)
    ours, plain = (
        ZeroAdamW(mine[:8], lr=1e-2, eps=1e-6, fused=False),
        torch.optim.AdamW(theirs[:8], lr=1e-2, eps=1e-6, fused=False),
    )
    assert not any(p in ours.state for p in mine[4:])
    trained = list(range(4))
    for step in range(12):
        if step == 3:
            ours.add_param_group({"params": mine[8:], "lr": 3e-3, "amsgrad": True})
            plain.add_param_group({"params": theirs[8:], "lr": 3e-3, "amsgrad": True})
            trained += range(8, len(mine))
        if step == 6:
            for params in (mine, theirs):
                for param in params[4:8]:
                    param.requires_grad_(True)
            trained += range(4, 8)
        set_gradients(step, [mine[i] for i in trained], [theirs[i] for i in trained])
        ours.step()
        plain.step()
        assert_same(ours, plain)
    assert_same_on_all_ranks(mine)


@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_can_be_added_and_parameters_thawed_in_the_middle_of_training(run_ranks, world_size: int) -> None:
    run_ranks(growing, world_size)


def missing_gradients() -> None:
    mine, theirs = parameters(), parameters()
    ours, plain = (
        ZeroAdamW(mine, lr=1e-2, eps=1e-6, fused=False),
        torch.optim.AdamW(theirs, lr=1e-2, eps=1e-6, fused=False),
    )
    for step in range(9):
        set_gradients(step, mine, theirs)
        for i in range(len(mine)):
            if (i + step) % 3 == 0:
                mine[i].grad = theirs[i].grad = None
        ours.step()
        plain.step()
    assert_same(ours, plain)
    assert {int(ours.state[p]["step"]) for p in mine} == {6}
    before = [p.detach().clone() for p in mine]
    ours.zero_grad()
    ours.step()
    assert all(torch.equal(p, b) for p, b in zip(mine, before, strict=True))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_parameter_without_gradient_is_left_alone(run_ranks, world_size: int) -> None:
    run_ranks(missing_gradients, world_size)


def other_strides() -> None:
    """Gradients need not lie in memory as their parameters do."""
    for options, bound in (({"fused": False}, (0.0, 0.0)), ({"fused": True}, (1e-5, 1e-6))):
        mine, theirs = parameters()[5:12], dense(parameters()[5:12])
        ours = ZeroAdamW(mine, lr=1e-2, eps=1e-6, **options)
        plain = torch.optim.AdamW(theirs, lr=1e-2, eps=1e-6, fused=False)
        for step in range(3):
            set_gradients(step, mine, theirs)
            for param in mine:
                param.grad = param.grad.contiguous()
            for param in theirs:
                param.grad = param.grad.contiguous()
            ours.step()
            plain.step()
        assert_same(ours, plain, *bound)


def test_gradients_may_have_other_strides_than_their_parameters(run_ranks) -> None:
    run_ranks(other_strides, 2)


def small_groups() -> None:
    """Ranks 0 and 2, and ranks 1 and 3, each train a model of their own."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    params, reference = parameters(), parameters()
    with torch.no_grad():
        for param in (*params, *reference):
            param.add_(mine)
    ours = ZeroAdamW(params, lr=1e-2, eps=1e-6, fused=False, process_group=pairs[mine])
    plain = torch.optim.AdamW(reference, lr=1e-2, eps=1e-6, fused=False)
    for step in range(5):
        set_gradients(step + 100 * mine, params, reference)
        ours.step()
        plain.step()
    assert_same(ours, plain)
    piece = ours.state[params[5]]["exp_avg"].to_local()
    assert piece.shape == (100, 192)


def test_two_groups_of_two_in_a_world_of_four(run_ranks) -> None:
    run_ranks(small_groups, 4)


def counted_state(world_size: int) -> None:
    params = [nn.Parameter(torch.zeros(1000, 64)), nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(()))]
    optimizer = ZeroAdamW(params)
    for param in params:
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[param][key]
            assert isinstance(state, DTensor)
            assert state.shape == param.shape
            assert state.stride() == param.stride()
            local = state.to_local()
            assert local.numel() == max(1, param.numel() // world_size)
            assert local.untyped_storage().nbytes() == local.nbytes


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_state_is_there_from_the_start_and_holds_its_share_only(run_ranks, world_size: int) -> None:
    run_ranks(counted_state, world_size, world_size)


def many_buckets() -> None:
    """Packed and direct buckets of several groups, one after another, far more than staging memories."""
    lists = []
    for _ in range(2):
        torch.manual_seed(0)
        lists.append([nn.Parameter(torch.randn((600, 512) if i % 4 == 3 else (40 + i, 30))) for i in range(40)])
    ours, plain = (
        cls([{"params": params[i : i + 5]} for i in range(0, 40, 5)], lr=1e-2, fused=False, **options)
        for cls, params, options in zip(
            (ZeroAdamW, torch.optim.AdamW), lists, ({"bucket_cap_mb": 0.002}, {}), strict=True
        )
    )
    for step in range(3):
        set_gradients(step, *lists)
        ours.step()
        plain.step()
    assert len(ours._plan.buckets) > 5 * STAGING_SLOTS
    assert_same(ours, plain)


@pytest.mark.parametrize("world_size", [2, 3])
def test_buckets_that_share_staging_memory_do_not_meet_there(run_ranks, world_size: int) -> None:
    run_ranks(many_buckets, world_size)


def bounded_staging() -> None:
    params = [nn.Parameter(torch.zeros(64, 64)) for _ in range(300)]
    optimizer = ZeroAdam(params, bucket_cap_mb=0.25)
    assert len(optimizer._plan.buckets) > STAGING_SLOTS
    memory = {b.packing.rows.memory.untyped_storage().data_ptr() for b in optimizer._plan.buckets}
    sizes = {b.packing.rows.memory.untyped_storage().nbytes() for b in optimizer._plan.buckets}
    assert len(memory) == STAGING_SLOTS
    assert max(sizes) <= 2**18


def test_staging_memory_does_not_grow_with_the_model(run_ranks) -> None:
    run_ranks(bounded_staging, 2)


def published_example(cls: type[torch.optim.Optimizer]) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = cls(model.parameters(), lr=1e-3, fused=False)  # type: ignore[call-arg]
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.tensor([[1.0, 2.0]])), torch.tensor([[1.0]]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_published_example(run_ranks, world_size: int) -> None:
    """Every rank trains on the same sample; losses at epochs 5, 10, …, 50 as published, all as torch's Adam."""
    published = [0.809774, 0.721449, 0.638959, 0.562460, 0.491979, 0.428558, 0.372196, 0.320848, 0.274360, 0.232563]
    expected_losses, expected_params = published_example(torch.optim.Adam)
    for losses, params in run_ranks(published_example, world_size, ZeroAdam):
        assert losses[4::5] == pytest.approx(published, abs=2e-6, rel=0)
        assert losses == expected_losses
        assert all(torch.equal(p, q) for p, q in zip(params, expected_params, strict=True))
