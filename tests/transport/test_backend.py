"""The collectives of a backend of its own: one for a bucket, unequal rows in place, nobody waits before it must."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW
from zeroadam.layout.packing import adjoins
from zeroadam.layout.rows import RowRules
from zeroadam.reduce.grad_bucket import GradBucket
from zeroadam.reduce.hook import Reduction
from zeroadam.transport import Backend, OrderedBackend, backend

SHAPES = [(101, 7), (40, 12), (3, 2), (127, 3, 3, 3), (), (7,), (6, 6, 6, 2), (2, 200), (1, 300)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(shape) for shape in SHAPES])
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(weight * (x + i)).square().sum() for i, weight in enumerate(self.weights)]).sum()


def count() -> Counter[str]:
    """Of each kind of collective from now on."""
    calls: Counter[str] = Counter()

    def counted(name: str, collective: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return collective(*args)

        return call

    for name in ("all_gather_together", "reduce_scatter_together", "broadcast_rows", "reduce_rows"):
        setattr(backend, name, counted(name, getattr(backend, name)))
    return calls


def train(cls: Any, hook: bool) -> tuple[list[Tensor], Any]:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=hook)
    optimizer = cls(model if cls is ZeroAdamW and hook else net.parameters(), lr=1e-2, fused=False)
    for step in range(4):
        torch.manual_seed(10 * step + dist.get_rank())
        model(torch.randn(())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in net.parameters()], optimizer


def unequal_rows(hook: bool) -> list[Tensor]:
    Backend.rules = RowRules(equal=True, direct_bytes=2**30, large_bytes=1000)
    calls = count()
    ours, optimizer = train(ZeroAdamW, hook)
    plain, _ = train(torch.optim.AdamW, hook)
    packed = {param for bucket in optimizer._plan.buckets for param in bucket.packed}
    for param in optimizer.param_groups[0]["params"]:
        in_place = param.nbytes >= 1000 and adjoins(param.detach(), dist.get_world_size())
        assert in_place == (param not in packed and param.dim() > 0)
    assert calls["broadcast_rows"] >= 4 * 2  # in four steps (101, 7) and (127, 3, 3, 3) at least
    assert (calls["reduce_rows"] >= 4 * 2) == hook
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if dist.get_world_size() == 2 else 1e-6)
    return ours


@pytest.mark.parametrize("transport", ["backend", "late backend"])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_large_tensors_travel_in_place_also_in_unequal_rows(run_ranks: Any, world_size: int, transport: str) -> None:
    """Some ranks of five own nothing of a tensor. DDP's own sum is bitwise equal on two ranks."""
    for hook in (False, True):
        first, *others = run_ranks(unequal_rows, world_size, hook, transport=transport)
        for other in others:
            assert all(map(torch.equal, first, other))


def waits() -> None:
    events: list[str] = []

    def noted(cls: Any, name: str) -> None:
        method = getattr(cls, name)

        def call(self: Any, *args: Any) -> Any:
            if not (cls is GradBucket and self.staged):
                events.append(f"{cls.__name__}.{name}")
            return method(self, *args)

        setattr(cls, name, call)

    model = DistributedDataParallel(
        nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), gradient_as_bucket_view=True, bucket_cap_mb=1
    )
    optimizer = ZeroAdamW(model)
    for _ in range(2):
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for cls, name in ((GradBucket, "start"), (GradBucket, "finish"), (Reduction, "finish")):
        noted(cls, name)
    Backend.rules = RowRules(equal=True, direct_bytes=0)
    optimizer.reduction.known.clear()
    model(torch.ones(1, 512)).sum().backward()
    counts = Counter(events)
    assert counts["GradBucket.start"] == counts["GradBucket.finish"] >= 5
    ended = events.index("Reduction.finish")
    assert "GradBucket.finish" not in events[:ended]
    assert "GradBucket.start" not in events[ended:]


def test_gradients_in_place_are_waited_for_at_the_end_of_backward_only(run_ranks: Any) -> None:
    """On a GPU a wait before holds up the stream of backward."""
    run_ranks(waits, 2, transport="backend")


def collectives() -> None:
    calls = count()
    net = nn.Sequential(*(nn.Linear(600, 600) for _ in range(40)))  # of 1.4 MB each
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model)
    for _ in range(2):
        model(torch.ones(1, 600)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    calls.clear()
    model(torch.ones(1, 600)).sum().backward()
    optimizer.step()
    buckets = len(optimizer._plan.buckets)
    assert dict(calls) == {"all_gather_together": buckets, "reduce_scatter_together": len(optimizer.reduction.known)}
    assert buckets == 4  # 3 of at most 25 MB, and one of biases
    assert len(optimizer.reduction.known) == 4  # DDP's own, of which the first has 1 MB


def test_one_collective_for_each_bucket(run_ranks: Any) -> None:
    run_ranks(collectives, 2, transport="backend")


def ordered(dtype: torch.dtype, kind: str) -> None:
    """Beside one process that adds the gradients of all ranks up in rank order and in float32."""
    Backend.rules = OrderedBackend.rules = RowRules(equal=True, direct_bytes=500, large_bytes=1000)
    net, plain = Net().to(dtype), Net().to(dtype)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.005)
    optimizer = ZeroAdamW(model, lr=1e-2, fused=False, ordered_sums=True)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=False)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    expected = OrderedBackend if kind.endswith("backend") else object
    assert isinstance(optimizer._transports.of(torch.device("cpu")), expected)
    for step in range(3):
        grads = []
        for source in range(world_size):
            torch.manual_seed(10 * step + source)
            x = torch.randn(())
            if source == rank:
                model(x).backward()
            adamw.zero_grad()
            plain(x).backward()
            grads.append([param.grad.float() for param in plain.parameters()])
        for param, of_ranks in zip(plain.parameters(), zip(*grads, strict=True), strict=True):
            total = of_ranks[0]
            for grad in of_ranks[1:]:
                total = total + grad
            param.grad = total.to(dtype) / world_size
        optimizer.step()
        adamw.step()
        optimizer.zero_grad()
        for one, other in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("transport", ["backend", "late backend", "sockets", "shared memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ordered_sums(run_ranks: Any, world_size: int, dtype: torch.dtype, transport: str) -> None:
    run_ranks(ordered, world_size, dtype, transport, transport=transport)


def other_sums() -> None:
    model = DistributedDataParallel(nn.Linear(256, 256), gradient_as_bucket_view=True)
    for ordered_sums in (False, True):
        optimizer = ZeroAdamW(model.parameters(), ordered_sums=ordered_sums)
        assert optimizer._transports.of(torch.device("cpu")).senders == (dist.get_world_size() if ordered_sums else 0)
    with pytest.raises(RuntimeError, match="disagree on ordered_sums: "):
        ZeroAdamW(model.parameters(), ordered_sums=dist.get_rank() == 0)


def test_ranks_agree_on_ordered_sums(run_ranks: Any) -> None:
    run_ranks(other_sums, 2, transport="backend")
