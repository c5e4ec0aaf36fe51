"""Master weights: the numbers are those of float32 AdamW on a float32 copy; the parameters are these rounded."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adam_reference import full, set_gradients
from commands import zeroadam
from master_reference import OPTIONS, WAYS, compare, float_copies, low_precision, master_of, train
from on_a_backend import on_a_backend
from state_checks import equal
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdam, ZeroAdamW, checkpoint, reduce_scatter_hook
from zeroadam.update.master import join, split


def test_a_remainder_holds_every_float32_to_the_last_bit() -> None:
    """Every sign, exponent and high mantissa with the low halves around 0, a half and 1, and random ones."""
    generator = torch.Generator().manual_seed(0)
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    random = torch.randint(2**16, (2**16, 8), generator=generator, dtype=torch.int32)
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=torch.int32)
    bits = torch.cat([high | low, high | random], 1)
    numbers = bits.view(torch.float32)
    param, remainder = (torch.empty_like(numbers, dtype=torch.bfloat16) for _ in range(2))
    room = torch.empty_like(bits)
    split(numbers, param, remainder, room)
    is_nan, is_half = numbers.isnan(), (bits & 0xFFFF) == 0x8000
    assert torch.equal(param.isnan(), is_nan)
    back = join(param, remainder, room)
    assert torch.equal(back.isnan(), is_nan)
    assert torch.equal(back.view(torch.int32)[~is_nan], bits[~is_nan])
    assert torch.equal(param[~is_nan & ~is_half], numbers.to(torch.bfloat16)[~is_nan & ~is_half])
    halves = is_half & ~is_nan
    assert torch.equal(param[halves].view(torch.int16), ((bits[halves] >> 16) + 1).to(torch.int16))  # away from zero


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_bitwise_equal_to_float32_adamw(run_ranks, way: str, world_size: int) -> None:
    run_ranks(train, world_size, ZeroAdamW, {"weight_decay": 0.1}, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (ZeroAdamW, {"amsgrad": True, "maximize": True, "foreach": True}),
        (ZeroAdam, {"weight_decay": 0.1, "amsgrad": True}),
        (ZeroAdam, {"maximize": True}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_bitwise_equal_with_options(run_ranks, cls: type[ZeroAdam], options: dict[str, Any], way: str) -> None:
    run_ranks(train, 2, cls, options, way)


def with_hook(way: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 520), nn.ReLU(), nn.Linear(520, 7), nn.LayerNorm(7)).to(torch.bfloat16)
    net[3].float()
    net[3].register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    params = list(model.parameters())
    copies = float_copies(params)
    optimizer = ZeroAdamW(params, **OPTIONS, **WAYS[way])
    plain = torch.optim.AdamW(copies, **OPTIONS)
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        model(torch.randn(5, 300, generator=generator).to(torch.bfloat16)).square().sum().backward()
        for p, q in zip(params, copies, strict=True):
            total = p.grad.float()  # the owner's rows are the sum, the others' zero
            dist.all_reduce(total)
            q.grad = total / dist.get_world_size()
        optimizer.step()
        plain.step()
        compare(optimizer, params, plain, copies, way)
        optimizer.zero_grad()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_bitwise_equal_with_the_hook(run_ranks, way: str, world_size: int) -> None:
    """Fed the sum that the hook left in bfloat16, over W, in float32."""
    run_ranks(with_hook, world_size, way)


@on_a_backend(1, 2, 3, 4)
def test_with_the_hook_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    run_ranks(with_hook, world_size, "remainder", transport=transport)


def follows(way: str, value: float) -> None:
    """A parameter that other code sets is where Adam goes on from; its neighbours keep what they have below it."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(64, 8).to(torch.bfloat16))]
    optimizer = ZeroAdamW(params, **OPTIONS, **WAYS[way])
    set_gradients(0, params)
    optimizer.step()
    copies = [nn.Parameter(master_of(optimizer, params[0]).clone())]
    plain = torch.optim.AdamW(copies, **OPTIONS)
    plain.load_state_dict({**plain.state_dict(), "state": {0: whole_state(optimizer, params[0])}})
    with torch.no_grad():
        assert not (params[0] == value).any()  # set to what it was, it would not be seen to be set
        params[0].data[::3] = value
        copies[0][::3] = master_of(optimizer, params[0])[::3] if (way, value) == ("remainder", 8) else value
    set_gradients(1, params)
    copies[0].grad = params[0].grad.float()
    optimizer.step()
    plain.step()
    compare(optimizer, params, plain, copies, way)
    if value == 8:  # within half a unit in the last place
        assert (copies[0] - params[0]).abs().max() < 8 * 2**-8


def whole_state(optimizer: ZeroAdam, param: Tensor) -> dict[str, Any]:
    return {k: full(v).clone() for k, v in optimizer.state[param].items() if k not in ("master", "remainder")}


@pytest.mark.parametrize("value", [8.0, 0.0, -0.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_master_follows_a_parameter_that_is_set(run_ranks, way: str, value: float) -> None:
    run_ranks(follows, 2, way, value)


def round_trips(way: str, other: str) -> None:
    params = low_precision()
    optimizer = ZeroAdamW(params, **OPTIONS, **WAYS[way])
    for step in range(3):
        set_gradients(step, params)
        optimizer.step()
    saved = optimizer.state_dict(sharded=True)
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    expected = [master_of(optimizer, p) for p in params]
    again = ZeroAdamW(params, **OPTIONS, **WAYS[other])
    again.load_state_dict(saved)
    for p, master in zip(params, expected, strict=True):
        found = master_of(again, p)
        if way == other:
            assert torch.equal(found, master)
        else:  # but for halves, which the two ways round to different parameters: then it begins with the parameter
            half = (master.view(torch.int32) & 0xFFFF) == 0x8000 if p.dtype == torch.bfloat16 else master.isnan()
            assert torch.equal(found[~half], master[~half])
        assert equal(whole_state(again, p), whole_state(optimizer, p))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", WAYS)
def test_masters_are_saved_and_loaded_either_way(run_ranks, way: str, other: str) -> None:
    run_ranks(round_trips, 2, way, other)


def without_masters(way: str) -> None:
    """The state of float32 AdamW fits; a master is made from the parameter."""
    params = low_precision()
    copies = float_copies(params)
    plain = torch.optim.AdamW(copies, **OPTIONS)
    set_gradients(0, copies)
    plain.step()
    optimizer = ZeroAdamW(params, **OPTIONS, **WAYS[way])
    set_gradients(5, params)
    optimizer.step()
    optimizer.load_state_dict(plain.state_dict())
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(master_of(optimizer, p), p.detach().float())
        assert all(torch.equal(full(optimizer.state[p][key]), value) for key, value in plain.state[q].items())
    low = torch.optim.AdamW(params, **OPTIONS)
    low.step()
    optimizer.load_state_dict(low.state_dict())  # float32 holds every bfloat16
    for p in params:
        for key, value in low.state[p].items():
            assert torch.equal(full(optimizer.state[p][key]), value.to(optimizer.state[p][key].dtype))
    optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg is torch.float32, the parameter is torch.bfloat16"):
        ZeroAdamW(params, **OPTIONS).load_state_dict(optimizer.state_dict(sharded=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_state_without_masters_can_be_loaded(run_ranks, way: str) -> None:
    run_ranks(without_masters, 2, way)


def model_and_optimizer(**options: Any) -> tuple[nn.Module, ZeroAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 7)).to(torch.bfloat16)
    return model, ZeroAdamW(model.parameters(), **OPTIONS, **options)


def save(folder: str, way: str) -> list[Tensor]:
    model, optimizer = model_and_optimizer(**WAYS[way])
    for step in range(3):
        set_gradients(step, list(model.parameters()))
        optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=f"{folder}/with")
    without = {fqn: {k: v for k, v in entry.items() if k != way} for fqn, entry in optimizer_state["state"].items()}
    optimizer_state = {**optimizer_state, "state": without}
    dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=f"{folder}/without")
    return [master_of(optimizer, p).clone() for p in model.parameters()]


def load(folder: str, way: str, masters: list[Tensor]) -> None:
    for kind in ("with", "without"):
        model, optimizer = model_and_optimizer(**WAYS[way])
        set_gradients(7, list(model.parameters()))
        optimizer.step()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optim": optimizer_state}
        checkpoint.load(state, checkpoint_id=f"{folder}/{kind}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        for p, master in zip(model.parameters(), masters, strict=True):
            assert torch.equal(master_of(optimizer, p), master if kind == "with" else p.detach().float())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_masters_in_checkpoints_are_cut_anew(run_ranks, tmp_path: Path, way: str) -> None:
    masters = run_ranks(save, 3, str(tmp_path), way)[0]
    for world_size in (1, 2, 4):
        run_ranks(load, world_size, str(tmp_path), way, masters)
    done = zeroadam("export", f"{tmp_path}/with", f"{tmp_path}/adamw.pt")
    assert done.returncode == 0, done.stderr
    exported = torch.load(tmp_path / "adamw.pt", weights_only=True)
    assert equal([exported["master"][name] for name in exported["model"]], masters)
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in exported["optimizer"]["state"].values())


def state_bytes() -> dict[str, float]:
    """Bytes of state per parameter on this rank, of the tensors that are alive."""
    kinds = {
        "float32": (torch.float32, {}),
        "bfloat16": (torch.bfloat16, {}),
        **{way: (torch.bfloat16, options) for way, options in WAYS.items()},
        "bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
        "8-bit state": (torch.float32, {"state_dtype": torch.uint8}),
    }
    found = {}
    for name, (dtype, options) in kinds.items():
        params = [nn.Parameter(torch.zeros(256, 512, dtype=dtype))]
        if name != "8-bit state":  # which vectors do not have
            params.append(nn.Parameter(torch.zeros(128, dtype=dtype)))
        optimizer = ZeroAdamW(params, **options)
        set_gradients(0, params)
        optimizer.step()
        tensors = [v.to_local() for p in params for v in optimizer.state[p].values() if isinstance(v, DTensor)]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
        found[name] = sum(tensor.nbytes for tensor in tensors) / sum(p.numel() for p in params)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.slow
def test_bytes_per_parameter_are_those_of_the_readme(run_ranks, world_size: int) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("| ")]
    column = next(row for row in rows if "W = 1" in row).index(f"W = {world_size}")
    for counted in run_ranks(state_bytes, world_size):
        for name, label in {
            "float32": "float32",
            "bfloat16": "bfloat16",
            "master": "bfloat16, `master_dtype=torch.float32`",
            "remainder": "bfloat16, and `store_param_remainders=True`",
            "bfloat16 state": "float32, `state_dtype=torch.bfloat16`",
            "8-bit state": "float32, `state_dtype=torch.uint8`",
        }.items():
            row = next(row for row in rows if row[0] == label)
            assert f"{counted[name]:.3g} N" == row[column], name


def wrong_arguments() -> None:
    params = [nn.Parameter(torch.ones(4, 4).to(torch.bfloat16))]
    with pytest.raises(ValueError, match=r"master_dtype is torch.float32 or None, not torch.bfloat16"):
        ZeroAdamW(params, master_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"store_param_remainders=True needs master_dtype=torch.float32"):
        ZeroAdam(params, store_param_remainders=True)
    with pytest.raises(RuntimeError, match="disagree on store_param_remainders: True on rank 0; False on rank 1"):
        ZeroAdamW(params, master_dtype=torch.float32, store_param_remainders=dist.get_rank() == 0)
    optimizer = ZeroAdamW(params, **WAYS["remainder"])
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "remainder"}
    assert set(copy.deepcopy(optimizer.state_dict(sharded=True))["state"][0]) == set(optimizer.state[params[0]])


def test_wrong_arguments_raise_on_every_rank(run_ranks) -> None:
    run_ranks(wrong_arguments, 2)
