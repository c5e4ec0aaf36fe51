"""Ranks that disagree, and input that cannot be right, raise on every rank at once and never hang."""

import contextlib
import math
import random
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import at_most
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdam, ZeroAdamW, reduce_scatter_hook
from zeroadam.state.agreement import find_difference, fingerprints, read_scalars

ODD_RANK = 1


def raises(exception: type[Exception], message: str, build: Any) -> None:
    with pytest.raises(exception, match=message):
        build()


def model(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def disagree(case: str, message: str) -> None:
    odd = dist.get_rank() == ODD_RANK

    def build() -> None:
        net = model()
        named = net.named_parameters()
        if case == "groups":
            ZeroAdam([{"params": [p]} for p in list(net.parameters())[odd:]])
        elif case == "number":
            ZeroAdam(list(net.parameters())[: 3 if odd else 4])
        elif case == "name":
            ZeroAdam([(f"odd.{name}", p) if odd else (name, p) for name, p in named])
        elif case == "shape":
            ZeroAdam(model(width=5 if odd else 4).named_parameters())
        elif case == "dtype":
            ZeroAdam((net.double() if odd else net).named_parameters())
        elif case == "frozen":
            net[0].weight.requires_grad_(not odd)
            ZeroAdam(named)
        elif case == "lr":
            ZeroAdam(named, lr=1e-2 if odd else torch.tensor(1e-3))
        elif case == "betas":
            ZeroAdamW([{"params": [p]} for p in net.parameters()], betas=(0.9, 0.95 if odd else 0.999))
        elif case == "amsgrad":
            ZeroAdam(named, amsgrad=odd)
        elif case == "values":
            with torch.no_grad():
                net[1].weight[0, 0] += 1e-7 * odd
            optimizer = ZeroAdam(named)
            for _ in range(2):  # not only the first time
                with contextlib.suppress(RuntimeError):
                    optimizer.step()
            assert all(float(optimizer.state[p]["step"]) == 0 for p in net.parameters())
            optimizer.step()
        elif case == "invalid":
            ZeroAdam(named, lr=-1.0 if odd else 1e-3)
        elif case == "no group":
            ZeroAdam(named, process_group=0 if odd else None)
        elif case == "empty":
            ZeroAdam([] if odd else named)
        elif case == "later":
            optimizer = ZeroAdam(net.parameters())
            try:
                optimizer.add_param_group({"params": model(width=5 if odd else 4).parameters()})
            finally:
                assert len(optimizer.param_groups) == 1
                optimizer.step()
        elif case == "later, values":
            optimizer = ZeroAdam(net.parameters())
            optimizer.add_param_group({"params": model(seed=odd).parameters()})
            optimizer.step()

    expected = (
        {"invalid": ValueError, "no group": ValueError, "empty": ValueError}.get(case, RuntimeError)
        if odd
        else RuntimeError
    )
    raises(expected, message, build)
    dist.barrier()  # the process group is as good as before


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("groups", "disagree on the number of param groups: 4 on ranks 0, 2; 3 on rank 1"),
        ("number", "disagree on the number of parameters in group 0: 4 on ranks 0, 2; 3 on rank 1"),
        ("name", "disagree on parameter 0.weight: .* on ranks 0, 2; missing on rank 1"),
        ("shape", r"disagree on parameter 0.weight: shape \(4, 3\).* on ranks 0, 2; shape \(5, 3\).* on rank 1"),
        ("dtype", "disagree on parameter 0.weight: .*torch.float32 on ranks 0, 2; .*torch.float64 on rank 1"),
        ("frozen", "disagree on parameter 0.weight: .*float32 on ranks 0, 2; .*frozen on rank 1"),
        ("lr", "disagree on lr of group 0: 0.001.* on ranks 0, 2; 0.01 on rank 1"),
        ("betas", r"disagree on betas of group 0: \(0.9, 0.999\) on ranks 0, 2; \(0.9, 0.95\) on rank 1"),
        ("amsgrad", "disagree on amsgrad of group 0: False on ranks 0, 2; True on rank 1"),
        ("values", "disagree on the values of parameter 1.weight.*DistributedDataParallel.*hash"),
        ("invalid", "Invalid learning rate: -1.0"),
        ("no group", "process_group is one of .*, not a int"),
        ("empty", "optimizer got an empty parameter list"),
        ("later", "disagree on parameter 0 of group 1: shape"),
        ("later, values", "disagree on the values of parameter 0 of group 1"),
    ],
)
def test_ranks_that_disagree(run_ranks, case: str, message: str) -> None:
    run_ranks(disagree, 3, case, message, timeout=at_most(20))


def invalid() -> None:
    net = model()
    raises(ValueError, "empty parameter list", lambda: ZeroAdam([]))
    raises(ValueError, "differentiable=True is not supported", lambda: ZeroAdam(net.parameters(), differentiable=True))
    raises(
        ValueError,
        "parameter 0 of group 0 is complex.*view_as_real",
        lambda: ZeroAdam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
    )
    raises(ValueError, "Invalid learning rate", lambda: ZeroAdam(net.parameters(), lr=-1))
    raises(RuntimeError, "`fused` and `foreach` cannot", lambda: ZeroAdam(net.parameters(), fused=True, foreach=True))
    for group, kind in ((0, "int"), ([0, 1], "list"), ("world", "str")):
        message = rf"process_group is one of .*new_group\(\), or None for all ranks, not a {kind}"
        raises(ValueError, message, lambda group=group: ZeroAdam(net.parameters(), process_group=group))
    for size in (0, -1, math.nan, "25", None):
        message = "bucket_cap_mb is a positive number of megabytes, not "
        raises(ValueError, message, lambda size=size: ZeroAdam(net.parameters(), bucket_cap_mb=size))
    raises(ValueError, "group 0 holds a parameter twice", lambda: ZeroAdam([*net.parameters(), net[0].weight]))
    raises(
        ValueError,
        "some parameters appear in more than one parameter group",
        lambda: ZeroAdam([{"params": net.parameters()}, {"params": net.parameters()}]),
    )
    sharded = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2,)))
    raises(ValueError, "parameter 0 of group 0 is a DTensor", lambda: ZeroAdam([nn.Parameter(sharded)]))

    optimizer = ZeroAdam(net.parameters())
    raises(ValueError, "more than one parameter group", lambda: optimizer.add_param_group({"params": net[0].weight}))
    assert len(optimizer.param_groups) == 1
    net(torch.ones(3)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    net[1].bias.grad = net[1].bias.grad.to_sparse()
    raises(RuntimeError, r"shape \(2,\) has a sparse gradient.*sparse=False", optimizer.step)
    net[1].bias.grad = None
    net.to(torch.bfloat16)
    raises(RuntimeError, "build it after casting and moving the model", optimizer.step)
    net.to(torch.float32)
    assert all(float(optimizer.state[p]["step"]) == 0 for p in net.parameters())
    assert all(torch.allclose(p, b, rtol=1e-2) for p, b in zip(net.parameters(), before, strict=True))


def test_invalid_input_raises_on_every_rank_and_changes_nothing(run_ranks) -> None:
    run_ranks(invalid, 2)


def outside() -> None:
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        ZeroAdam(model().parameters(), process_group=pair)
    else:
        raises(
            ValueError,
            "this rank is not in process_group",
            lambda: ZeroAdam(model().parameters(), process_group=pair),
        )


def test_a_rank_outside_the_process_group(run_ranks) -> None:
    run_ranks(outside, 3)


def fingerprint(tensor: torch.Tensor) -> int:
    return fingerprints([torch.ones(2), tensor])[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_fingerprints_tell_every_single_element(dtype: torch.dtype) -> None:
    tensor = torch.arange(60).reshape(3, 20).to(dtype)
    seen = {fingerprint(tensor), fingerprint(tensor.flip(0))}
    for i in range(60):
        other = tensor.clone()
        other.view(-1)[i] += 1
        seen.add(fingerprint(other))
    assert len(seen) == 62
    assert fingerprint(tensor.t().contiguous().t()) == fingerprint(tensor)
    assert fingerprint(torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:]) == fingerprint(tensor)
    assert re.fullmatch("[0-9a-f]+", f"{fingerprint(tensor):x}")


def test_fingerprints_of_long_tensors_depend_on_the_order_of_their_chunks() -> None:
    tensor = torch.zeros(2**21)
    tensor[0] = 1
    assert fingerprint(tensor) != fingerprint(tensor.roll(2**20))
    assert fingerprint(torch.zeros(0)) == 0


def test_scalars_are_read_in_their_order() -> None:
    given = [torch.tensor(3), 2.5, torch.tensor([4.5]), torch.tensor(2**62 + 1), torch.tensor(0.5)]
    assert read_scalars(given) == [3, 2.5, 4.5, 2**62 + 1, 0.5]
    assert read_scalars([]) == []


def test_ranks_talk_through_the_device_of_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through the current one, which is the first GPU on all ranks unless somebody has set it."""
    events: list[Any] = []

    @contextlib.contextmanager
    def current(index: int | None) -> Any:
        events.append(index)
        yield
        events.append("left")

    class Group:
        def size(self) -> int:
            return 2

    def all_gather_object(answers: list[Any], mine: Any, group: Any) -> None:  # noqa: ARG001
        events.append("talk")
        answers[:] = [mine, mine]

    monkeypatch.setattr(torch.accelerator, "device_index", current, raising=False)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    group: Any = Group()
    assert find_difference(group, lambda: {}, lambda: torch.device("cuda:3")) is None
    assert find_difference(group, lambda: {}) is None
    assert events == [3, "talk", "left", None, "talk", "left"]


OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "master": {"master_dtype": torch.float32},
    "remainder": {"master_dtype": torch.float32, "store_param_remainders": True},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
}


def built_first(options: dict[str, Any], hook: bool) -> None:
    """As in nanoGPT, minGPT, timm, and Accelerate without a seed: the optimizer is there before DDP is."""
    trained = []
    for first in (True, False):
        net = model(width=9, seed=dist.get_rank() if first else 0)
        if "master_dtype" in options:
            net.bfloat16()
        decayed, others = [p for p in net.parameters() if p.dim() > 1], [p for p in net.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        wrapped = None if first else DistributedDataParallel(net, gradient_as_bucket_view=True)
        optimizer = ZeroAdamW(groups, lr=1e-2, **options)
        wrapped = wrapped or DistributedDataParallel(net, gradient_as_bucket_view=True)
        if hook:
            wrapped.register_comm_hook(optimizer, reduce_scatter_hook)
        for step in range(4):
            generator = torch.Generator().manual_seed(7 * step + dist.get_rank())
            wrapped(torch.randn(5, 3, generator=generator).to(decayed[0].dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer._difference is None
        trained.append([*net.parameters(), *(optimizer.state[p]["exp_avg"].full_tensor() for p in decayed)])
    assert all(map(torch.equal, *trained))


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_optimizer_may_be_built_before_ddp(run_ranks, options: str, hook: bool) -> None:
    run_ranks(built_first, 3, OPTIONS[options], hook)


def flip(param: torch.Tensor, position: int, bit: int) -> None:
    param.detach().view(-1).view(torch.int32)[position] ^= -(2**31) if bit == 31 else 2**bit


def flipped(cases: list[tuple[int, int, int, int]], every: int, frozen: bool) -> None:
    """(parameter, position, bit, rank) of one bit at a time."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(33))]
    params[2].requires_grad = False
    optimizer = ZeroAdamW(params, lr=1e-3)
    optimizer.check_agreement(every)
    for which, position, bit, rank in cases:
        param = params[2] if frozen else params[which]
        for number in range(every + 1):
            for trained in params[:2]:
                trained.grad = torch.ones_like(trained)
            if number == 0 and dist.get_rank() == rank:
                flip(param, position, bit)
            try:
                optimizer.step()
            except RuntimeError as error:
                message = str(error)
                break
        else:
            pytest.fail(f"not found within {every} steps: {which, position, bit, rank}")
        assert f"disagree on the values of parameter {2 if frozen else which} of group 0: hash" in message
        assert re.search(rf"on rank {rank}(;|$)", message), message
        if dist.get_rank() == rank:
            flip(param, position, bit)  # back again, and training goes on
        optimizer.step()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_flipped_bit_is_found_wherever_it_is(run_ranks: Any, world_size: int) -> None:
    """Of a trained parameter in the step that follows, at every position; in one that is frozen within N steps."""
    sizes = {0: 35, 1: 3}
    rng = random.Random(world_size)
    cases = [(which, at, rng.randrange(32), rng.randrange(world_size)) for which in sizes for at in range(sizes[which])]
    run_ranks(flipped, world_size, cases, 1, False)
    cases = [(2, at, bit, rng.randrange(world_size)) for at in (0, 31, 32) for bit in range(32)]
    run_ranks(flipped, world_size, cases, 3, True)


def no_alarm(transport: str) -> None:
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(()))]
    optimizer = ZeroAdamW(params, lr=torch.tensor(1e-3))
    optimizer.check_agreement(every=1)
    generator = torch.Generator().manual_seed(0)
    for step in range(3_000 if transport == "shared memory" else 200):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.param_groups[0]["lr"].mul_(0.999)
        optimizer.step()
        if step % 1000 == 7:
            optimizer.load_state_dict(optimizer.state_dict(sharded=True))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared memory", "sockets", "backend"])
def test_no_false_alarm(run_ranks: Any, transport: str) -> None:
    run_ranks(no_alarm, 2, transport, transport=transport)


def other_settings(what: str) -> None:
    optimizer = ZeroAdamW([param := nn.Parameter(torch.ones(4))], lr=torch.tensor(1e-3))
    optimizer.check_agreement(every=2)
    param.grad = torch.ones(4)
    optimizer.step()
    if dist.get_rank() == 1 and what == "lr":
        optimizer.param_groups[0]["lr"].fill_(1.0)
    elif dist.get_rank() == 1:
        optimizer.state[param]["step"].fill_(7)
    before = param.detach().clone()
    message = {"lr": "lr of group 0: 0.00100.* on rank 0; 1.0 on rank 1", "step": "the step of .*: 1.0 on rank 0; 7.0"}
    with pytest.raises(RuntimeError, match=f"disagree on {message[what]}"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("transport", ["shared memory", "backend"])
@pytest.mark.parametrize("what", ["lr", "step"])
def test_steps_and_learning_rates_in_tensors_are_compared(run_ranks: Any, what: str, transport: str) -> None:
    """Which no header has, as their values may not be known on the host."""
    run_ranks(other_settings, 2, what, transport=transport)


def added_beside_a_bad_group() -> None:
    optimizer = ZeroAdamW(model().parameters())
    if dist.get_rank() == ODD_RANK:
        optimizer.param_groups[0]["eps"] = "x"
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match="eps of param group 0 is 'x', not a number"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["eps"] = 1e-8
    optimizer.add_param_group({"params": [param := nn.Parameter(torch.ones(3))]})
    param.grad = torch.ones(3)
    optimizer.step()


def test_a_group_cannot_be_added_while_one_rank_has_a_bad_one(run_ranks: Any) -> None:
    """All ranks raise at once and stay as they were."""
    run_ranks(added_beside_a_bad_group, 2)
