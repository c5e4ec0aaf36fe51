"""Optimizers in the middle of a training, and what their states are compared by."""

from typing import Any

import torch
from adam_reference import assert_same, parameters, set_gradients
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zeroadam import ZeroAdam, ZeroAdamW

OPTIONS: dict[str, Any] = {"amsgrad": True, "eps": 1e-6, "fused": False}


def trained() -> tuple[ZeroAdamW, torch.optim.AdamW, list[nn.Parameter], list[nn.Parameter]]:
    """The same four steps by ours and by torch's."""
    mine, theirs = parameters(), parameters()
    ours, plain = ZeroAdamW(mine, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(4):
        set_gradients(step, mine, theirs)
        ours.step()
        plain.step()
    return ours, plain, mine, theirs


def assert_goes_on(ours: ZeroAdam, plain: torch.optim.Optimizer) -> None:
    """The next steps are the same as well."""
    lists = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (ours, plain)]
    for step in range(20, 22):
        set_gradients(step, *lists)
        ours.step()
        plain.step()
    assert_same(ours, plain)


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """A copy of this rank's state and of the param groups, as plain tensors and numbers."""
    state = [
        {k: v.to_local().clone() if isinstance(v, DTensor) else v.clone() for k, v in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
        if p in optimizer.state
    ]
    return state, [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


MB = 2**20


SLACK = 3 * MB
