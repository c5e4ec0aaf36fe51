"""What a step asks of a GPU and its network, counted without either: for the shapes of models that fit on no CPU.

The optimizer is built on the meta device in torch's fake process group of any size, on the code path of NCCL. Nothing
is computed and nothing is sent, but all else runs: the layout, the plan of the step, and each operator is dispatched.
The times are an estimate from a few constants, beside DDP + fused AdamW by the same constants: each collective takes
(W - 1) latencies and its bytes at the bandwidth (twice that for an all-reduce), the update and the staging copies their
bytes at the memory's bandwidth, each operator a launch. See `benchmark.py --host` for what the host takes.
"""

import argparse
import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from shapes import parameters
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import zeroadam.optimizer
import zeroadam.state.step_counts
import zeroadam.step_plan
import zeroadam.transport
from zeroadam import ZeroAdamW
from zeroadam.gather.param_bucket import staging_bytes
from zeroadam.transport import backend

DDP_FIRST_BYTES, DDP_BYTES = 2**20, 25 * 2**20  # of the buckets of DistributedDataParallel
ADAM_TRIPS = 7  # a gradient, a parameter and two moments are read, all but the gradient written


class Count(TorchDispatchMode):
    """Operators that run on the device: views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
        self.calls += not view and "profiler" not in str(func)
        return func(*args, **(kwargs or {}))


@dataclass
class Sent:
    """The collectives since the last `take`: how many calls, and the bytes of all ranks' rows in each."""

    calls: Counter[str] = field(default_factory=Counter)
    nbytes: list[int] = field(default_factory=list)

    def note(self, name: str, tensors: list[Tensor]) -> SimpleNamespace:
        self.calls[name] += 1
        self.nbytes.append(sum(tensor.nbytes for tensor in tensors))
        return SimpleNamespace(wait=lambda: None)

    def take(self) -> tuple[int, list[int]]:
        found = self.calls.total(), list(self.nbytes)
        self.calls.clear()
        self.nbytes.clear()
        return found


@contextlib.contextmanager
def nothing_is_sent(world_size: int) -> Iterator[Sent]:
    """A process group of `world_size` ranks, of which this is the first, and in which parameters may be on meta."""
    sent = Sent()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    collectives: dict[str, Any] = {
        "all_gather_together": lambda outputs, inputs, group: sent.note("all-gather", outputs),  # noqa: ARG005
        "reduce_scatter_together": lambda outputs, inputs, group: sent.note("reduce-scatter", inputs),  # noqa: ARG005
        "broadcast_rows": lambda rows, group: [sent.note("broadcasts", rows)],  # noqa: ARG005
        "reduce_rows": lambda rows, group: [sent.note("reduces", rows)],  # noqa: ARG005
    }
    with contextlib.ExitStack() as patches:
        for name, collective in collectives.items():
            patches.enter_context(mock.patch.object(backend, name, collective))
        for module in (zeroadam.optimizer, zeroadam.step_plan):
            patches.enter_context(mock.patch.object(module, "check_supported"))
        # Parameters on meta have no addresses, and no values to compare.
        patches.enter_context(mock.patch.object(zeroadam.step_plan, "check_memory"))
        patches.enter_context(mock.patch.object(zeroadam.optimizer, "find_difference", return_value=None))
        patches.enter_context(
            mock.patch.object(zeroadam.optimizer, "check_ranks_agree", lambda _, describe, *__: describe())
        )
        patches.enter_context(
            mock.patch.object(zeroadam.state.step_counts, "read_scalars", lambda steps: [0] * len(steps))
        )
        patches.enter_context(mock.patch.object(zeroadam.transport, "choose", lambda group, *_: backend.Backend(group)))
        try:
            yield sent
        finally:
            dist.destroy_process_group()


def ddp_buckets(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """As DistributedDataParallel makes them of gradients that come in the reverse order of forward."""
    backward = params[::-1]
    indices, _ = dist._compute_bucket_assignment_by_size(list[Tensor](backward), [DDP_FIRST_BYTES, DDP_BYTES])
    return [[backward[i] for i in some] for some in indices]


def count(model: str, world_size: int) -> dict[str, Any]:
    """Of one rank: collectives, operators and bytes in each backward and step."""
    params = parameters(model)
    buckets = ddp_buckets(params)
    with nothing_is_sent(world_size) as sent:
        optimizer = ZeroAdamW(params, fused=True)
        parts, in_hook = [], Count()
        for param in params:
            param.grad = torch.empty_like(param)
        for bucket in buckets:
            some: Any = SimpleNamespace(
                parameters=lambda bucket=bucket: bucket,
                gradients=lambda bucket=bucket: [param.grad for param in bucket],
                buffer=lambda: torch.empty(0, device="meta"),
            )
            parts += optimizer.reduction._parts(some, None)
        for part in parts:
            part.start(optimizer.reduction._memory(part))
        reduces, reduced = sent.take()
        with in_hook:
            for part in parts:
                part.packing.pack()
                part.finish()
        optimizer.step()  # lays the updates out
        sent.take()
        in_step = Count()
        with in_step:
            optimizer.step()
        gathers, gathered = sent.take()
        plan = optimizer._plan.buckets
        hook_staging = sum(memory.nbytes for memory in optimizer.reduction.memory.values())
    return {
        "params": params,
        "ddp buckets": [sum(param.nbytes for param in bucket) for bucket in buckets],
        "buckets": len(plan),
        "reduces": reduces,
        "reduced": reduced,
        "gathers": gathers,
        "gathered": gathered,
        "packed": sum(bucket.packing.nbytes for bucket in plan),
        "staging": staging_bytes(plan) + hook_staging,
        "hook operators": in_hook.calls,
        "step operators": in_step.calls,
    }


def backward_end(
    sizes: list[int], backward: float, constants: argparse.Namespace, world_size: int, times: int
) -> float:
    """Seconds from the start of backward until the last bucket is reduced; each is ready with its share of backward."""
    total, ready, free = sum(sizes), 0.0, 0.0
    for size in sizes:
        ready += backward * size / total
        free = max(free, ready) + times * collective(size, constants, world_size)
    return max(free, backward)


def collective(nbytes: int, constants: argparse.Namespace, world_size: int) -> float:
    """Seconds of a reduce-scatter or an all-gather of all ranks' rows, by a ring."""
    seconds: float = constants.latency * 1e-6 + nbytes / world_size / (constants.bandwidth * 1e9)
    return (world_size - 1) * seconds


def estimate(found: dict[str, Any], world_size: int, constants: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step of DDP + fused AdamW, and of ours, gathering in `step()` and in the next forward."""
    numel = sum(param.numel() for param in found["params"])
    itemsize = found["params"][0].itemsize
    forward = 2 * numel * constants.tokens / (constants.teraflops * 1e12)
    memory, launch = constants.memory * 1e12, constants.launch * 1e-6
    update = ADAM_TRIPS * itemsize * numel / memory
    ddp = forward + backward_end(found["ddp buckets"], 2 * forward, constants, world_size, 2) + update + 2 * launch
    ours = forward + backward_end(found["reduced"], 2 * forward, constants, world_size, 1)
    ours += itemsize * numel / memory + 4 * found["packed"] / memory  # zeros, and packing in both directions
    ours += update / world_size + (found["hook operators"] + found["step operators"]) * launch
    gathers = [collective(size, constants, world_size) for size in found["gathered"]]
    # In forward each bucket is needed when the computation of those before it is done.
    late = 0.0
    total = sum(found["gathered"])
    for done, before in zip(
        itertools.accumulate(gathers), itertools.accumulate(found["gathered"][:-1], initial=0), strict=True
    ):
        late = max(late, done - forward * before / total)
    return {"DDP": 1e3 * ddp, "ours": 1e3 * (ours + sum(gathers)), "in forward": 1e3 * (ours + late)}


def table(models: list[str], world_sizes: list[int], constants: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for model in models:
        for world_size in world_sizes:
            found = count(model, world_size)
            times = estimate(found, world_size, constants)
            yield {
                "model": model,
                "W": world_size,
                "buckets": found["buckets"],
                "all-gathers": found["gathers"],
                "DDP's buckets": len(found["ddp buckets"]),
                "reduce-scatters": found["reduces"],
                "sent, MB": (world_size - 1) / world_size * (sum(found["reduced"]) + sum(found["gathered"])) / 1e6,
                "staging, MB": found["staging"] / 1e6,
                "operators: hook": found["hook operators"],
                "step": found["step operators"],
                "estimate: DDP, ms": times["DDP"],
                "ours": times["ours"] / times["DDP"],
                "in forward": times["in forward"] / times["DDP"],
            }


def amount(text: str) -> float:
    """0 or more."""
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def positive(text: str) -> float:
    if not amount(text):
        raise ValueError
    return float(text)


def several(text: str) -> int:
    """A number of ranks that have something to send."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"at least 2 ranks have something to send, not {text}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    constants = parser.add_argument_group("the constants of the estimate of --launches")
    constants.add_argument("--latency", type=amount, default=3, metavar="US", help="microseconds between neighbours")
    constants.add_argument("--bandwidth", type=positive, default=50, metavar="GB/s", help="of each rank's link")
    constants.add_argument("--memory", type=positive, default=2.5, metavar="TB/s", help="of a GPU's memory")
    constants.add_argument("--teraflops", type=positive, default=400, help="that the matrix products reach")
    constants.add_argument("--tokens", type=positive, default=16384, help="per rank and step")
    constants.add_argument("--launch", type=amount, default=4, metavar="US", help="microseconds for each operator")
