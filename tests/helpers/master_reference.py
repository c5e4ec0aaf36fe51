"""Low-precision parameters, and the float32 training that their masters have to follow to the bit."""

from typing import Any

import torch
from adam_reference import PLAIN, assert_same_on_all_ranks, full, mine, parameters, set_gradients
from torch import Tensor, nn

from zeroadam import ZeroAdam
from zeroadam.update.master import join, split

OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-6, "fused": False}


WAYS: dict[str, dict[str, Any]] = {
    "master": {"master_dtype": torch.float32},
    "remainder": {"master_dtype": torch.float32, "store_param_remainders": True},
}


def rounded(master: Tensor, param: Tensor, way: str) -> Tensor:
    if way == "remainder" and param.dtype == torch.bfloat16:
        result = torch.empty_like(param)
        split(master, result, torch.empty_like(param), torch.empty_like(param, dtype=torch.int32))
        return result
    return master.to(param.dtype)


def master_of(optimizer: ZeroAdam, param: Tensor) -> Tensor:
    """[d0, ...] float32, from whatever there is."""
    state = optimizer.state[param]
    if "remainder" in state:
        assert param.dtype == torch.bfloat16
        return join(param.detach(), full(state["remainder"]), torch.empty_like(param, dtype=torch.int32))
    return full(state["master"]) if "master" in state else param.detach().float()


def compare(optimizer: ZeroAdam, params: list[Any], plain: torch.optim.Optimizer, copies: list[Any], way: str) -> None:
    for p, q in zip(params, copies, strict=True):
        if p.itemsize >= 4:
            assert torch.equal(p, q)
        else:
            assert torch.equal(master_of(optimizer, p), q)
            assert torch.equal(p, rounded(q.detach(), p, way))
        for key, value in plain.state[q].items():
            assert torch.equal(*mine(optimizer.state[p][key], value)), key
    assert_same_on_all_ranks(params)


def float_copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone() if p.itemsize >= 4 else p.detach().float()) for p in params]


def low_precision() -> list[nn.Parameter]:
    """Every shape and order in bfloat16, two in float16; some float32 and float64 ones among them."""
    params = parameters()
    return [nn.Parameter(p.detach().to(torch.bfloat16) if i % 4 < 3 else p.detach()) for i, p in enumerate(params)] + [
        nn.Parameter(torch.randn(300, 70).to(torch.float16)),
        nn.Parameter(torch.randn(9).to(torch.float16)),
    ]


def step_both(
    step: int, optimizer: ZeroAdam, params: list[Any], plain: torch.optim.Optimizer, copies: list[Any]
) -> None:
    """With the same gradients, cast for the copies."""
    set_gradients(step, params)
    for p, q in zip(params, copies, strict=True):
        q.grad = torch.empty_like(q).copy_(p.grad)
    optimizer.step()
    plain.step()


def train(cls: type[ZeroAdam], options: dict[str, Any], way: str) -> None:
    params = low_precision()
    copies = float_copies(params)
    optimizer = cls(params, **OPTIONS, **options, **WAYS[way], bucket_cap_mb=0.0625)
    plain = PLAIN[cls](copies, **OPTIONS, **options)
    for step in range(6):
        step_both(step, optimizer, params, plain, copies)
        compare(optimizer, params, plain, copies, way)
