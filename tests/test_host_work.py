"""What a step asks of the host does not grow with the number of parameters, but for the lists of foreach calls."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from zeroadam import ZeroAdamW, reduce_scatter_hook
from zeroadam.transport import Backend

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 + master": {"master_dtype": torch.float32},
}


class Count(TorchDispatchMode):
    """The operators that are dispatched from Python, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "profiler" not in str(func):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(8, 8), (7,), (3, 5)]  # of which W = 2 divides one, and W = 3 another
        self.weights = nn.ParameterList([torch.ones(shapes[i % 3], dtype=dtype) for i in range(count)])

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum()


def counted(count: int, case: str) -> tuple[dict[str, int], dict[str, int], int]:
    """Operators of a step, and of the hook, and the buckets of the optimizer."""
    dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
    net = Model(count, dtype)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(net.parameters(), **CASES[case])
    reduction, found = optimizer.reduction, Count()
    model.register_comm_hook(optimizer, reduce_scatter_hook)
    for _ in range(3):  # DDP rebuilds its buckets in the second
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert isinstance(optimizer._transports.of(torch.device("cpu")), Backend) == (dist.get_world_size() > 1)
    reduce, finish, hook = reduction.reduce, reduction.finish, Count()

    def counted_reduce(*args: Any) -> Any:
        with hook:
            return reduce(*args)

    def counted_finish() -> None:
        with hook:
            finish()

    reduction.reduce, reduction.finish = counted_reduce, counted_finish  # type: ignore[method-assign]
    model().backward()
    with found:
        optimizer.step()
    return dict(found.calls), dict(hook.calls), len(optimizer._plan.buckets)


def both(case: str) -> list[tuple[dict[str, int], dict[str, int], int]]:
    return [counted(count, case) for count in (30, 300)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_operators_of_a_step_are_a_constant_for_each_bucket(run_ranks: Any, case: str, world_size: int) -> None:
    """On the code path of NCCL, at any W: no operator for each parameter, nor for each rank."""
    for few, many in run_ranks(both, world_size, case, transport="backend"):
        assert few == many
        step, hook, buckets = many
        print(step, hook)
        assert buckets == 1
        # On the CPU 5 of either take some values of the gradients of a DDP bucket and compare them; 4 are of a header.
        assert sum(step.values()) <= (20 if "master" in case else 12) + 5 + 4
        assert sum(hook.values()) <= 12 + 5 + 4
