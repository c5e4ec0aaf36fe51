"""State dicts go back and forth between this optimizer and torch's own, to the bit; a misfit changes nothing."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adam_reference import assert_same, parameters, set_gradients
from measure import memory, start_peak
from on_a_backend import on_a_backend
from state_checks import MB, OPTIONS, SLACK, assert_goes_on, equal, snapshot, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW


def back_and_forth(folder: str) -> None:
    ours, plain, mine, _ = trained()
    again = ZeroAdamW(mine, lr=1.0, **OPTIONS)
    again.load_state_dict(ours.state_dict(sharded=True))
    assert_same(again, plain)
    again.load_state_dict(again.state_dict(sharded=True))
    assert_same(again, plain)

    if dist.get_rank() == 0:
        torch.save(plain.state_dict(), f"{folder}/adamw.pt")
    dist.barrier()
    for saved in (copy.deepcopy(plain.state_dict()), torch.load(f"{folder}/adamw.pt", mmap=True)):
        before = copy.deepcopy(saved)
        from_plain = ZeroAdamW(mine, lr=1.0, **OPTIONS)
        from_plain.load_state_dict(state_dict=saved)
        assert_same(from_plain, plain)
        assert equal(saved, before)
    assert_goes_on(from_plain, plain)
    assert equal(saved, before)  # and it has not been trained on


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_its_own_state_dict_and_that_of_torch_can_be_loaded(run_ranks, tmp_path: Path, world_size: int) -> None:
    run_ranks(back_and_forth, world_size, str(tmp_path))


@on_a_backend(1, 2, 3, 4)
@pytest.mark.slow
def test_state_dicts_can_be_loaded_on_the_code_path_of_nccl(
    run_ranks, tmp_path: Path, transport: str, world_size: int
) -> None:
    run_ranks(back_and_forth, world_size, str(tmp_path), transport=transport)


def consolidated(to: int | str) -> bytes | None:
    ours, plain, _, _ = trained()
    ours.consolidate_state_dict(to)
    if to not in ("all", dist.get_rank()):
        with pytest.raises(RuntimeError, match="the other ranks hold the rest"):
            torch.save(ours.state_dict(), io.BytesIO())
        ours.load_state_dict(ours.state_dict(sharded=True))
        return None
    file = io.BytesIO()
    torch.save({"optimizer": ours.state_dict()}, file)
    file.seek(0)
    saved, expected = torch.load(file, weights_only=True)["optimizer"], plain.state_dict()
    assert equal(saved, expected)
    for key, entry in saved["state"].items():
        for name, value in entry.items():
            assert type(value) is Tensor
            assert value.stride() == expected["state"][key][name].stride()
    ours.load_state_dict(ours.state_dict(sharded=True))
    return file.getvalue()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_consolidated_it_is_the_state_dict_of_torch(run_ranks, world_size: int) -> None:
    """0-d, empty, transposed and channels_last parameters included; and plain AdamW trains on from it."""
    file = run_ranks(consolidated, world_size, world_size - 1)[-1]
    run_ranks(plain_goes_on, 1, file)


def test_all_ranks_have_the_whole(run_ranks) -> None:
    assert None not in run_ranks(consolidated, 3, "all")


def plain_goes_on(file: bytes) -> None:
    ours, _, _, theirs = trained()
    plain = torch.optim.AdamW(theirs, lr=1.0, **OPTIONS)
    plain.load_state_dict(torch.load(io.BytesIO(file), weights_only=True)["optimizer"])
    assert_goes_on(ours, plain)


def consolidated_in_batches() -> None:
    """On NCCL a lone send makes a communicator for its pair of ranks; a batch does not."""

    def alone(*_: Any) -> None:
        raise AssertionError

    send, receive = (dist.ProcessGroup.__dict__[name] for name in ("send", "recv"))  # with how they are bound
    dist.ProcessGroup.send = dist.ProcessGroup.recv = alone
    batches, batch = [], dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> Any:
        batches.append(len(operations))
        dist.ProcessGroup.send, dist.ProcessGroup.recv = send, receive
        try:
            return batch(operations)
        finally:
            dist.ProcessGroup.send = dist.ProcessGroup.recv = alone

    dist.batch_isend_irecv = counted
    consolidated(2)
    assert batches


def test_pieces_are_gathered_in_batches_where_the_backend_is_not_gloo(run_ranks) -> None:
    run_ranks(consolidated_in_batches, 3, transport="backend")


def consolidation_ends() -> None:
    ours, _, mine, _ = trained()
    rank = dist.get_rank()

    def is_whole() -> bool:
        try:
            return type(ours.state_dict()["state"][5]["exp_avg"]) is Tensor
        except RuntimeError:
            return False

    ours.consolidate_state_dict()
    assert is_whole() == (rank == 0)
    set_gradients(7, mine)
    ours.step()
    assert not is_whole()
    ours.consolidate_state_dict(to=1)
    assert is_whole() == (rank == 1)
    ours.load_state_dict(ours.state_dict(sharded=True))
    assert not is_whole()
    ours.consolidate_state_dict()
    ours.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert not is_whole()
    with pytest.raises(ValueError, match="there is no rank 2 in a process group of 2"):
        ours.consolidate_state_dict(2)
    with pytest.raises((ValueError, RuntimeError), match="there is no rank 9 in"):
        ours.consolidate_state_dict(9 if rank == 1 else 0)  # the other rank hears of it
    with pytest.raises(ValueError, match="there is no rank 'every' in a process group of 2"):
        ours.consolidate_state_dict("every")
    with pytest.raises(RuntimeError, match="disagree on the rank to gather the state to: 0 on rank 0; 1 on rank 1"):
        ours.consolidate_state_dict(rank)


def test_a_consolidated_state_dict_is_there_until_the_next_step(run_ranks) -> None:
    run_ranks(consolidation_ends, 2)


def full_by_torch() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    lists = [list(model.parameters()) for model in models]
    ours, plain = ZeroAdamW(lists[0], **OPTIONS), torch.optim.AdamW(lists[1], **OPTIONS)
    set_gradients(0, *lists)
    ours.step()
    plain.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_optimizer_state_dict(models[0], ours, options=options)
    if dist.get_rank() == 0:
        assert equal(full, get_optimizer_state_dict(models[1], plain))
    else:
        assert full == {}


def test_torch_gathers_the_full_state_dict_as_well(run_ranks) -> None:
    run_ranks(full_by_torch, 3)


def not_for_saving() -> None:
    """Alone and without communication: rank 1 does none of it."""
    param = nn.Parameter(torch.ones(4, 4))
    optimizer, plain = ZeroAdamW([param]), torch.optim.AdamW([param], fused=True)
    optimizer.state["mine"] = plain.state["mine"] = 7
    assert optimizer.state_dict() == plain.state_dict()  # before the first step, as there
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["mine"] == 7
    param.grad = torch.ones(4, 4)
    optimizer.step()
    if dist.get_rank() == 1:
        return
    message = r"zeroadam\.save\(.*consolidate_state_dict\(to=0\).*torch\.distributed\.checkpoint\.save\(\)"
    with pytest.raises(RuntimeError, match=message):
        optimizer.state_dict()
    state_dict = optimizer.state_dict(sharded=True)
    for holder in (state_dict, {"optimizer": state_dict}, copy.deepcopy(state_dict), copy.copy(state_dict)):
        with pytest.raises(RuntimeError, match=message):
            torch.save(holder, io.BytesIO())
    with pytest.raises(RuntimeError, match=message):
        pickle.dumps(state_dict, protocol=5)
    state_dict["state"][0]["exp_avg"].to_local().fill_(1.0)
    copied = copy.deepcopy(optimizer.state_dict(sharded=True))
    assert torch.equal(copied["state"][0]["exp_avg"].to_local(), torch.ones(2, 4))
    copied["state"][0]["exp_avg"].to_local().zero_()
    assert optimizer.state_dict(sharded=True)["state"][0]["exp_avg"].to_local().sum() == 8


def test_a_part_of_the_state_is_not_saved_for_the_whole(run_ranks) -> None:
    run_ranks(not_for_saving, 2)


def without(entry: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state_dict: state_dict["state"][1].pop(entry)


def cast_back(state_dict: dict[str, Any]) -> None:
    state_dict["state"][12]["exp_avg_sq"] = state_dict["state"][12]["exp_avg_sq"].float()


def of_sgd(state_dict: dict[str, Any]) -> None:
    params = parameters()
    sgd = torch.optim.SGD([{"params": params[:9]}, {"params": params[9:]}], lr=0.1, momentum=0.9)
    set_gradients(0, params)
    sgd.step()
    state_dict.clear()
    state_dict.update(sgd.state_dict())


MISFITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d["param_groups"].pop(), "the state dict has 1 param groups, the optimizer has 2"),
    (lambda d: d["param_groups"][1]["params"].pop(), "group 1 of the state dict has 6 parameters, .* has 7"),
    (lambda d: d["param_groups"][0].pop("betas"), "group 0 of the state dict has no betas"),
    (lambda d: d["param_groups"][0].update(differentiable=True), "differentiable=True is not supported"),
    (without("step"), "the state of parameter a1 does not fit: it has no step"),
    (without("exp_avg_sq"), "the state of parameter a1 does not fit: it has no exp_avg_sq"),
    (without("max_exp_avg_sq"), "the state of parameter a1 does not fit: it has no max_exp_avg_sq"),
    (
        lambda d: d["state"][7].update(exp_avg=torch.zeros(3)),
        r"exp_avg has shape \(3,\), not \(3, 4096\) as the parameter asks for",
    ),
    (cast_back, r"parameter a12 does not fit: exp_avg_sq is torch.float32, the parameter is torch.bfloat16"),
    (lambda d: d["state"].update({99: {}}), "has state of 99, which is in none of its groups"),
    (lambda d: d.pop("state"), "not the state dict of an optimizer: it has no 'state'"),
    (of_sgd, "has no betas: it is of another kind of optimizer"),
    (
        lambda d: d["param_groups"][0]["param_names"].reverse(),
        "group 0 .* has the parameters in another order: a8 for a0",
    ),
]


def two_groups(cls: type[torch.optim.Optimizer], params: list[nn.Parameter]) -> torch.optim.Optimizer:
    names = [(f"a{i}", param) for i, param in enumerate(params)]
    return cls([{"params": names[:9]}, {"params": names[9:], "lr": 0.5}], **OPTIONS)  # type: ignore[arg-type]


def misfits() -> None:
    mine, theirs = parameters(), parameters()
    ours, plain = two_groups(ZeroAdamW, mine), two_groups(torch.optim.AdamW, theirs)
    for step in range(2):
        set_gradients(step, mine, theirs)
        ours.step()
        plain.step()
    set_gradients(2, theirs)
    plain.step()
    before = snapshot(ours)
    for edit, message in MISFITS:
        for bad_ranks in ({0, 1}, {1}):
            state_dict = copy.deepcopy(plain.state_dict())
            expected = (ValueError, message)
            if dist.get_rank() in bad_ranks:
                edit(state_dict)
            else:
                expected = (RuntimeError, f"rank 1 of the process group failed: ValueError: .*{message}")
            with pytest.raises(expected[0], match=expected[1]):
                ours.load_state_dict(state_dict)
            assert equal(snapshot(ours), before)
    for key, value in {"lr": 0.25, "amsgrad": False, "fused": True}.items():
        state_dict = copy.deepcopy(plain.state_dict())
        state_dict["param_groups"][1][key] = value if dist.get_rank() == 1 else OPTIONS.get(key, 0.5)
        with pytest.raises(RuntimeError, match=f"disagree on {key} of group 1: .* on rank 0; {value} on rank 1"):
            ours.load_state_dict(state_dict)
        assert equal(snapshot(ours), before)
    state_dict = copy.deepcopy(plain.state_dict())
    state_dict["state"][3]["step"] += dist.get_rank()
    with pytest.raises(RuntimeError, match="the state of parameter a3: of step 3 on rank 0; of step 4 on rank 1"):
        ours.load_state_dict(state_dict)
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    of_one = ZeroAdamW(parameters(), process_group=alone, **OPTIONS)
    other = ZeroAdamW(parameters(), **OPTIONS)
    with pytest.raises(
        ValueError, match=r"is cut as \(Shard\(dim=0\),\) over 1 ranks, this optimizer cuts it as .* over 2"
    ):
        other.load_state_dict({**other.state_dict(sharded=True), "state": dict(enumerate(of_one.state.values()))})
    assert equal(snapshot(ours), before)
    other.load_state_dict(of_one.state_dict())  # of one rank it is whole
    ours.load_state_dict(plain.state_dict())
    assert_same(ours, plain_over(mine, plain))


def test_a_misfit_is_named_on_every_rank_and_changes_nothing(run_ranks) -> None:
    run_ranks(misfits, 2)


def options_survive() -> None:
    """What is loaded decides over the kernel, where the step count lies, and which moments there are, as in torch."""
    params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(3))]
    for saved_options in ({"fused": True}, {"foreach": True}, {"capturable": True}, {"amsgrad": True}, {}):
        plain = torch.optim.AdamW(copy.deepcopy(params), **saved_options)
        if not saved_options.get("capturable"):  # on the CPU such a one cannot step
            set_gradients(0, plain.param_groups[0]["params"])
            plain.step()
        ours = ZeroAdamW(params, amsgrad=not saved_options.get("amsgrad"))
        ours.load_state_dict(plain.state_dict())
        for key, value in plain.param_groups[0].items():
            if key != "params":
                chosen = key == "fused" and not saved_options.keys() & {"foreach", "fused"}
                assert ours.param_groups[0][key] == (True if chosen else value), key
        for param in params:
            assert ("max_exp_avg_sq" in ours.state[param]) == bool(saved_options.get("amsgrad"))
            step = ours.state[param]["step"]
            assert (step.device, step.dtype, step.shape) == (param.device, torch.float32, ())
        if not saved_options.get("capturable"):
            assert_same(ours, plain_over(params, plain))


def plain_over(params: list[nn.Parameter], plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """AdamW over other parameters with the groups and the state of `plain`, whose own may have gone a step further."""
    rest = iter(params)
    other = torch.optim.AdamW([{"params": list(islice(rest, len(group["params"])))} for group in plain.param_groups])
    other.load_state_dict(plain.state_dict())
    return other


def test_every_option_survives(run_ranks) -> None:
    run_ranks(options_survive, 2)


def fresh_and_frozen() -> None:
    """A dict from before the first step resets the state; a parameter that was frozen there starts anew."""
    params = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(3))]
    ours = ZeroAdamW(params)
    untouched = torch.optim.AdamW(copy.deepcopy(params)).state_dict()
    set_gradients(0, params)
    ours.step()
    half = torch.optim.AdamW(copy.deepcopy(params))
    half.param_groups[0]["params"][1].requires_grad_(False)
    set_gradients(1, half.param_groups[0]["params"][:1])
    half.step()
    ours.load_state_dict(half.state_dict())
    assert [float(ours.state[p]["step"]) for p in params] == [1, 0]
    assert ours.state[params[0]]["exp_avg"].full_tensor().count_nonzero() > 0
    assert ours.state[params[1]]["exp_avg"].full_tensor().count_nonzero() == 0
    ours.load_state_dict(untouched)
    assert [float(ours.state[p]["step"]) for p in params] == [0, 0]
    assert not any(ours.state[p][key].full_tensor().any() for p in params for key in ("exp_avg", "exp_avg_sq"))


def test_state_that_is_not_in_the_dict_starts_anew(run_ranks) -> None:
    run_ranks(fresh_and_frozen, 2)


def exchanged() -> None:
    """The optimizer's own tensors in each other's places: none is overwritten before it has been read."""
    params = [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
    ours = ZeroAdamW(params)
    set_gradients(0, params)
    ours.step()
    before = [ours.state[p]["exp_avg"].full_tensor().clone() for p in params]
    state_dict = ours.state_dict(sharded=True)
    state_dict["state"] = {0: state_dict["state"][1], 1: state_dict["state"][2], 2: state_dict["state"][0]}
    ours.load_state_dict(state_dict)
    after = [ours.state[p]["exp_avg"].full_tensor() for p in params]
    assert equal(after, [before[1], before[2], before[0]])


def test_entries_of_its_own_may_be_exchanged(run_ranks) -> None:
    run_ranks(exchanged, 2)


def hooks() -> None:
    """A user's hooks run as in torch: before loading they may adapt the dict, after it they see what was loaded."""
    ours, plain, mine, _ = trained()
    seen = []
    other = ZeroAdamW(mine, **OPTIONS)
    saved = plain.state_dict()
    saved["state"] = {key + 100: entry for key, entry in saved["state"].items()}

    def renumber(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {key - 100: entry for key, entry in state_dict["state"].items()}}

    other.register_load_state_dict_pre_hook(renumber)
    other.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[mine[0]]["step"])))
    other.load_state_dict(saved)
    assert seen == [4]
    assert_same(other, plain)
    other.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(seen=len(state_dict["state"])))
    assert other.state_dict(sharded=True)["seen"] == len(mine)
    other.consolidate_state_dict()
    assert other.state_dict()["seen"] == len(mine)
    assert_same(ours, plain)


def test_the_hooks_of_torch_are_called(run_ranks) -> None:
    run_ranks(hooks, 2)


def pickled(folder: str) -> None:
    """A DDP model with the hook, which has its optimizer, and the optimizer itself."""
    model = DistributedDataParallel(nn.Linear(3, 2), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    file = f"{folder}/{dist.get_rank()}.pt"
    with pytest.warns(UserWarning, match=r"left out of what is pickled: use zeroadam\.save"):
        torch.save({"model": model, "optimizer": optimizer}, file)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded["model"].module.weight, model.module.weight)
    with pytest.raises(AttributeError, match="no step: a sharded optimizer is left out"):
        loaded["optimizer"].step()


def test_a_ddp_model_with_the_hook_can_be_pickled(run_ranks, tmp_path: Path) -> None:
    run_ranks(pickled, 2, str(tmp_path))


def removed_after_consolidation() -> None:
    params = [nn.Parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = ZeroAdamW(params)
    optimizer.consolidate_state_dict()
    del optimizer.state[optimizer.param_groups[0]["params"].pop()]
    assert list(optimizer.state_dict()["state"]) == [0]


def test_a_parameter_may_be_removed_after_consolidation(run_ranks) -> None:
    run_ranks(removed_after_consolidation, 2)


def before_and_after_refusals() -> None:
    params = [nn.Parameter(torch.ones(4, 2)) for _ in range(3)]
    optimizer = ZeroAdamW([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.param_groups.pop()  # torch has no state of what was never trained
    assert optimizer.state_dict()["state"] == {}
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert list(optimizer.state_dict(sharded=True)["state"]) == [0, 1]
    optimizer.consolidate_state_dict()
    optimizer.param_groups[0]["eps"] = "x"
    with pytest.raises(ValueError, match="not a number"):
        optimizer.step()
    optimizer.param_groups[0]["eps"] = 1e-8
    assert list(optimizer.state_dict()["state"]) == [0, 1]  # a refused step has changed nothing
    other = ZeroAdamW([nn.Parameter(torch.ones(4, 2))])
    next(iter(other.state.values()))["exp_avg"].fill_(1)
    with pytest.raises(RuntimeError, match="this rank has a part"):
        other.state_dict()  # it is not that of a new optimizer any more


def test_state_dicts_before_the_first_step_and_after_a_refused_one(run_ranks) -> None:
    run_ranks(before_and_after_refusals, 2)


def other_results_of_hooks() -> None:
    optimizer = ZeroAdamW([nn.Parameter(torch.ones(4, 2))])
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"format": 2, "optimizer": state_dict})
    state_dict = optimizer.state_dict(sharded=True)
    assert list(state_dict) == ["format", "optimizer"]
    with pytest.raises(RuntimeError, match="this rank has a part of the optimizer's state"):
        torch.save(state_dict, io.BytesIO())


def test_a_hook_may_return_another_dict(run_ranks) -> None:
    """Of which the state is marked as a part all the same."""
    run_ranks(other_results_of_hooks, 2)


def peaks(folder: str) -> dict[str, int]:
    """The most bytes above the start, for 2 parameters of 32 MB."""
    params = [nn.Parameter(torch.zeros(4096, 2048)) for _ in range(2)]
    optimizer = ZeroAdamW(params)
    for param in params:  # touch the memory
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key].to_local().fill_(1.0)
    rank, result = dist.get_rank(), {}
    dist.barrier()
    start = start_peak()
    optimizer.consolidate_state_dict()
    result["consolidate"] = memory("VmHWM") - start
    if rank == 0:
        torch.save(optimizer.state_dict(), f"{folder}/adamw.pt")
    dist.barrier()
    optimizer._whole_state = None
    start = start_peak()
    saved = torch.load(f"{folder}/adamw.pt", mmap=True)
    optimizer.load_state_dict(saved)
    result["load"] = memory("VmHWM") - start
    return result


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_of_full_export_and_of_loading_a_plain_file(run_ranks, tmp_path: Path) -> None:
    """Export: the state on rank 0 and no more than a parameter elsewhere. Loading: the mapped pages of the shard."""
    whole, param, huge_page = 2 * 2 * 32 * MB, 32 * MB, 2 * MB
    first, *others = run_ranks(peaks, 4, str(tmp_path))
    assert first["consolidate"] <= whole + param + SLACK
    assert all(other["consolidate"] <= param + SLACK for other in others)
    # At both ends of each of the four pieces the kernel may map the whole of a huge page.
    assert all(rank["load"] <= whole / 4 + 4 * 2 * huge_page + SLACK for rank in (first, *others))
