"""Moments in fewer bits: the numbers are those of float32 Adam whose moments are rounded after each step, at any W."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adam_reference import PLAIN, assert_same_on_all_ranks, full, set_gradients
from commands import zeroadam as command
from master_reference import WAYS, float_copies, low_precision, master_of, step_both
from on_a_backend import on_a_backend
from state_checks import equal
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import zeroadam.update.adam
from zeroadam import ZeroAdam, ZeroAdamW, checkpoint, reduce_scatter_hook
from zeroadam.options import block_numel
from zeroadam.update.rounding import dequantize, quantize, round_stochastically

OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-6, "fused": False}
STATES = {"bfloat16": torch.bfloat16, "8bit": torch.uint8}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def stochastic(value: Tensor, step: int) -> Tensor:
    result = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically(value.clone(), result, torch.tensor(float(step)), torch.empty_like(value, dtype=torch.int32))
    return result


def test_rounding_is_to_a_neighbour_and_right_in_the_mean() -> None:
    """For numbers of every size and sign, more evenly over the steps than by chance: see the bound."""
    steps = 2**12
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2000,), generator=generator, dtype=torch.int64).to(torch.int32)
    value = bits.view(torch.float32)
    value = value[value.abs() < 3e38]  # neither nan nor inf, not even after rounding
    below = (value.view(torch.int32) >> 16 << 16).view(torch.float32)  # towards zero
    above = ((value.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    up = torch.zeros_like(value)
    for step in range(1, steps + 1):
        rounded = stochastic(value, step).float()
        assert ((rounded == below) | (rounded == above)).all()
        up += rounded == above
    wanted = (value.view(torch.int32) & 0xFFFF) / 2**16
    assert ((up / steps) - wanted).abs().max() < 8 / steps  # chance: a deviation of 0.5 / steps**0.5 = 32 / steps
    assert torch.equal(stochastic(below, 5).float(), below)


def test_rounding_does_not_favour_a_neighbour_at_any_one_step() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2**20, generator=generator)
    for step in (1, 2, 3, 1000):
        error = stochastic(value, step).float() - value
        unit = value.abs().log2().floor().exp2() * 2**-7
        # Five deviations of a mean over the some 2,000 pairs of neighbours where most numbers are.
        assert abs((error / unit).mean()) < 5 * math.sqrt(1 / 6 / 2000)


def test_what_is_no_number_stays_what_it_is() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0, -(2**31)], dtype=torch.int32)
    for step in range(1, 50):
        rounded = stochastic(bits.view(torch.float32), step)
        assert rounded[:3].isnan().all()
        assert rounded[3:].tolist() == [math.inf, -math.inf, 0.0, 0.0]


def test_a_slow_average_is_not_lost() -> None:
    """Each step adds 1/1000 of the distance, which rounding to nearest loses as soon as it is 1/512 of the number."""
    near, sr, exact = (torch.full((1000,), 0.5, dtype=dtype) for dtype in (torch.bfloat16, torch.bfloat16, None))
    for step in range(1, 4000):
        near = (near.float() * 0.999 + 0.001).to(torch.bfloat16)
        sr = stochastic(sr.float() * 0.999 + 0.001, step)
        exact = exact * 0.999 + 0.001
    assert (near - exact).abs().mean() > 0.2
    assert abs(sr.float().mean() - exact.mean()) < 0.01
    assert (sr.float() - exact).abs().max() < 0.15


def params_of(way: str | None) -> list[nn.Parameter]:
    """Every shape, order and dtype, and some whose rows are blocks."""
    params = low_precision()
    rows = [torch.randn(256, 256), torch.randn(256, 2, 96), torch.randn(384, 64), torch.randn(1024, 128)]
    params += [nn.Parameter(tensor.to(dtype)) for tensor in rows for dtype in (torch.float32, torch.bfloat16)]
    return params if way else [p for p in params if p.dtype != torch.float16]


def keep(plain: torch.optim.Optimizer, params: list[nn.Parameter], state_dtype: torch.dtype) -> None:
    """Do to the moments of a plain Adam in float32 what keeping them in fewer bits does."""
    for q, p in zip(plain.param_groups[0]["params"], params, strict=True):
        for moment in MOMENTS:
            value = plain.state[q].get(moment)
            if value is None or value.dtype == torch.float64:
                continue
            if state_dtype == torch.bfloat16:
                value.copy_(stochastic(value, int(plain.state[q]["step"])))
            elif block := block_numel(p):
                value.copy_(dequantize(*quantize(value, moment, block), moment))


def moments_of(optimizer: ZeroAdam, param: Tensor) -> dict[str, Tensor]:
    """In full, and as Adam sees them."""
    state = {name: full(value) for name, value in optimizer.state[param].items()}
    for moment in MOMENTS:
        if moment + "_8bit" in state:
            state[moment] = dequantize(state.pop(moment + "_8bit"), state.pop(moment + "_absmax"), moment)
    return {name: value for name, value in state.items() if name in MOMENTS}


def compare(optimizer: ZeroAdam, params: list[nn.Parameter], plain: torch.optim.Optimizer) -> None:
    for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
        found = moments_of(optimizer, p)
        for name in found:
            assert torch.equal(found[name].to(q.dtype), plain.state[q][name]), name
        has_master = {"master", "remainder"} & optimizer.state[p].keys()
        assert torch.equal(master_of(optimizer, p) if has_master else p, q if has_master else q.to(p.dtype))
        if not has_master:
            q.data.copy_(p)
    assert_same_on_all_ranks(params)


def train(cls: type[ZeroAdam], options: dict[str, Any], state: str, way: str | None) -> None:
    zeroadam.update.adam.BLOCK_NUMEL = 2**13  # less than a piece
    params = params_of(way)
    copies = float_copies(params)
    kept = {"state_dtype": STATES[state], **(WAYS[way] if way else {})}
    optimizer = cls(params, **OPTIONS, **options, **kept, bucket_cap_mb=0.0625)
    eligible = [p for p in params if block_numel(p)]
    assert len(eligible) == 8
    assert all(("exp_avg_8bit" in optimizer.state[p]) == (state == "8bit") for p in eligible)
    plain = PLAIN[cls](copies, **OPTIONS, **options)
    for step in range(6):
        step_both(step, optimizer, params, plain, copies)
        keep(plain, params, STATES[state])
        compare(optimizer, params, plain)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("way", [None, "remainder"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.slow
def test_the_numbers_are_rounded_float32_adamw(run_ranks, state: str, way: str | None, world_size: int) -> None:
    """So they do not depend on W."""
    run_ranks(train, world_size, ZeroAdamW, {"weight_decay": 0.1}, state, way)


@pytest.mark.parametrize("options", [{"amsgrad": True, "maximize": True}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.slow
def test_with_options(run_ranks, state: str, options: dict[str, Any]) -> None:
    run_ranks(train, 2, ZeroAdam, options, state, "master")


def with_hook(state: str) -> None:
    """Beside an optimizer without it that is fed the mean of the same gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 7)).to(torch.bfloat16)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    params = list(model.parameters())
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    options = {**OPTIONS, "state_dtype": STATES[state]}
    optimizer, other = ZeroAdamW(params, **options), ZeroAdamW(copies, **options)
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        model(torch.randn(5, 64, generator=generator).to(torch.bfloat16)).square().sum().backward()
        for p, q in zip(params, copies, strict=True):
            total = p.grad.float()  # the owner's rows are the sum, the others' zero
            dist.all_reduce(total)
            # in float32, which is how the optimizer with the hook divides; a bfloat16 gradient could not hold it
            q.grad = (total / dist.get_world_size()).to(p.dtype)
            assert dist.get_world_size() == 3 or torch.equal(q.grad.float(), total / dist.get_world_size())
        optimizer.step()
        other.step()
        if dist.get_world_size() != 3:
            for p, q in zip(params, copies, strict=True):
                assert torch.equal(p, q)
                assert equal(*({k: full(v) for k, v in o.state[t].items()} for o, t in ((optimizer, p), (other, q))))
        optimizer.zero_grad()
    assert_same_on_all_ranks(params)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.slow
def test_with_the_hook(run_ranks, state: str, world_size: int) -> None:
    """To the bit where dividing by W is exact."""
    run_ranks(with_hook, world_size, state)


@on_a_backend(1, 2, 3, 4)
@pytest.mark.slow
def test_with_the_hook_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    run_ranks(with_hook, world_size, "8bit", transport=transport)


def trained(steps: int, **options: Any) -> tuple[nn.Module, ZeroAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)).to(torch.bfloat16)
    optimizer = ZeroAdamW(model.parameters(), **OPTIONS, **options)
    for step in range(steps):
        set_gradients(step, list(model.parameters()))
        optimizer.step()
    return model, optimizer


def round_trips(state: str) -> None:
    """Through its own dict, a plain file, and a plain AdamW, back to itself and to float32."""
    model, optimizer = trained(3, state_dtype=STATES[state])
    before = [moments_of(optimizer, p) for p in model.parameters()]
    own = optimizer.state_dict(sharded=True)
    _, again = trained(1, state_dtype=STATES[state])
    again.load_state_dict(own)
    assert equal([moments_of(again, p) for p in again.param_groups[0]["params"]], before)

    optimizer.consolidate_state_dict(to=0)
    saved: list[Any] = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    for entry, moments in zip(saved[0]["state"].values(), before, strict=True):
        assert entry.keys() == {"step", *moments}
        assert equal({name: entry[name].to(moment.dtype) for name, moment in moments.items()}, moments)
    copies = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    plain = torch.optim.AdamW(copies, **OPTIONS)
    plain.load_state_dict(saved[0])
    plain.step()
    _, again = trained(1, state_dtype=STATES[state])
    again.load_state_dict(saved[0])  # what has been rounded is hardly rounded once more
    for p, moments in zip(again.param_groups[0]["params"], before, strict=True):
        for name, found in moments_of(again, p).items():
            # On the CPU, bitsandbytes does not always take the nearest of the smallest of its 256 numbers.
            torch.testing.assert_close(found, moments[name], rtol=0, atol=1e-4 * float(found.abs().max()))
    _, whole = trained(1, master_dtype=torch.float32)
    whole.load_state_dict(saved[0])
    for p, moments in zip(whole.param_groups[0]["params"], before, strict=True):
        assert equal(moments_of(whole, p), {name: moment.float() for name, moment in moments.items()})
    whole.load_state_dict(own)  # of pieces, as they are kept
    for p, moments in zip(whole.param_groups[0]["params"], before, strict=True):
        assert equal(moments_of(whole, p), {name: moment.float() for name, moment in moments.items()})


@pytest.mark.parametrize("state", STATES)
@pytest.mark.slow
def test_moments_are_saved_and_loaded(run_ranks, state: str) -> None:
    run_ranks(round_trips, 2, state)


def save(folder: str, state: str) -> list[dict[str, Tensor]]:
    model, optimizer = trained(3, state_dtype=STATES[state])
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=folder)
    return [{name: value.clone() for name, value in moments_of(optimizer, p).items()} for p in model.parameters()]


def load(folder: str, state: str, expected: list[dict[str, Tensor]]) -> None:
    model, optimizer = trained(1, state_dtype=STATES[state])
    model_state, optimizer_state = get_state_dict(model, optimizer)
    loaded = {"model": model_state, "optim": optimizer_state}
    checkpoint.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert equal([moments_of(optimizer, p) for p in model.parameters()], expected)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.slow
def test_checkpoints_are_cut_anew_and_exported(run_ranks, tmp_path: Path, state: str) -> None:
    expected = run_ranks(save, 3, str(tmp_path / "saved"), state)[0]
    for world_size in (1, 2, 4):
        run_ranks(load, world_size, str(tmp_path / "saved"), state, expected)
    done = command("export", f"{tmp_path}/saved", f"{tmp_path}/adamw.pt")
    assert done.returncode == 0, done.stderr
    exported = torch.load(tmp_path / "adamw.pt", weights_only=True)["optimizer"]["state"]
    for entry, moments in zip(exported.values(), expected, strict=True):
        assert equal({name: value for name, value in entry.items() if name != "step"}, moments)


def wrong_arguments() -> None:
    params = [nn.Parameter(torch.ones(64, 64))]
    with pytest.raises(ValueError, match=r"state_dtype is torch.bfloat16, torch.uint8 or None, not torch.float16"):
        ZeroAdamW(params, state_dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"disagree on state_dtype: torch.bfloat16 on rank 0; None on rank 1"):
        ZeroAdamW(params, state_dtype=torch.bfloat16 if dist.get_rank() == 0 else None)
    zeroadam.options.bitsandbytes.cache_clear()
    sys.modules["bitsandbytes.functional"] = None  # type: ignore[assignment]  # as if it were not installed
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'bitsandbytes>=0.49'"):
        ZeroAdamW(params, state_dtype=torch.uint8)


def divided_blocks() -> None:
    zeroadam.options.WORLD_SIZES = (1, 2, 4)  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"on 3 ranks would cut the rows of a parameter of shape \(64, 256\).* \(1, 2, 4\)"
    ):
        ZeroAdamW([nn.Parameter(torch.ones(64, 256))], state_dtype=torch.uint8)


def test_a_number_of_ranks_that_would_divide_blocks_is_refused(run_ranks) -> None:
    run_ranks(divided_blocks, 3)


def test_wrong_arguments_raise_on_every_rank(run_ranks) -> None:
    run_ranks(wrong_arguments, 2)
