"""optimizer.report(): bytes that a network interface counts too, and seconds that add up."""

import os
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import StepReport, ZeroAdamW, bf16_reduce_scatter_hook, plan, reduce_scatter_hook

HOOKS = {"none": None, "float32": reduce_scatter_hook, "bfloat16": bf16_reduce_scatter_hook}


def reports(hook: str, in_forward: bool) -> tuple[list[StepReport], float, int]:
    """Of three steps; what the longest of them took; and what plan() says is sent."""
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 700), nn.Tanh(), nn.Linear(700, 301), nn.LayerNorm(301))
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model.parameters())
    if HOOKS[hook] is not None:
        model.register_comm_hook(optimizer, HOOKS[hook])
    if in_forward:
        optimizer.gather_in_forward(model)
    assert optimizer.report() == StepReport(0, 0, 0.0, 0.0, 1.0, 0)
    found, longest = [], 0.0
    for _ in range(3):
        start = time.perf_counter()
        model(torch.ones(4, 300)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        longest = max(longest, time.perf_counter() - start)
        found.append(optimizer.report())
    optimizer.finish_gather()
    planned = plan(model.parameters(), dist.get_world_size(), hook=HOOKS[hook], backend="gloo")[dist.get_rank()]
    return found, longest, planned.sent - (0 if HOOKS[hook] else planned_all_reduce(model))


def planned_all_reduce(model: nn.Module) -> int:
    """Which the optimizer does not see."""
    size, world_size = sum(param.nbytes for param in model.parameters()), dist.get_world_size()
    return 2 * (world_size - 1) * size // world_size


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_bytes_and_seconds(run_ranks: Any, world_size: int, hook: str, in_forward: bool) -> None:
    """As many bytes in every step, as planned; what all send is what all receive; no more seconds than there were."""
    ranks = run_ranks(reports, world_size, hook, in_forward)
    for found, longest, planned in ranks:
        for report in found:
            assert report.sent == planned
            assert 0 < report.update < longest
            assert 0 < report.communication < longest
            assert report.update + report.communication < longest
            assert 1.0 <= report.imbalance < 1.01
            assert replace(report, update=0.0, communication=0.0) == replace(found[0], update=0.0, communication=0.0)
    for step in range(3):
        assert sum(found[step].sent for found, _, _ in ranks) == sum(found[step].received for found, _, _ in ranks)


def late() -> StepReport:
    optimizer = ZeroAdamW([nn.Parameter(torch.ones(600, 600))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(600, 600)
    optimizer.step()
    if dist.get_rank() == 1:
        time.sleep(0.5)
    optimizer.step()
    return optimizer.report()


def test_who_waits_for_whom(run_ranks: Any) -> None:
    first, second = run_ranks(late, 2)
    assert first.communication > 0.4
    assert second.communication < 0.4


def traced() -> set[str]:
    model = DistributedDataParallel(nn.Linear(300, 700), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model.parameters())
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    with torch.profiler.profile() as profiler:
        model(torch.ones(4, 300)).sum().backward()
        optimizer.step()
    return {event.key for event in profiler.key_averages()}


def test_phases_have_names_in_a_trace(run_ranks: Any) -> None:
    for names in run_ranks(traced, 2):
        assert {"zeroadam.update", "zeroadam.all_gather", "zeroadam.reduce_scatter"} <= names
