"""Ranks that disagree, and input that cannot be right, raise on every rank at once and never hang."""

import contextlib
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdam, ZeroAdamW, reduce_scatter_hook
from zeroadam.state.agreement import fingerprint

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

    expected = {"invalid": ValueError, "empty": ValueError}.get(case, RuntimeError) if odd else RuntimeError
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
        ("empty", "optimizer got an empty parameter list"),
        ("later", "disagree on parameter 0 of group 1: shape"),
        ("later, values", "disagree on the values of parameter 0 of group 1"),
    ],
)
def test_ranks_that_disagree(run_ranks, case: str, message: str) -> None:
    run_ranks(disagree, 3, case, message, timeout=20)


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


def test_no_process_group() -> None:
    raises(RuntimeError, "init_process_group.*torchrun", lambda: ZeroAdam(model().parameters()))


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
