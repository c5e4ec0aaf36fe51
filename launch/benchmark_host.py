"""Host time of the optimizer: process CPU time beside torch's own, for many tiny parameters. See `benchmark.py --host`.

What Python costs between two launches decides how fast a GPU is kept busy. Parameters of 8 x 8 on the CPU cost next to
nothing but that. Each rank alternates torch's fused AdamW and ours, and `clip_grad_norm_` of both. W = 1, 2 and 8 are
real processes over gloo; W = 64 and 512 one process in torch's fake process group, which sends nothing.
"""

import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW, reduce_scatter_hook

FAKE = (64, 512)


class Model(nn.Module):
    """`count` parameters of 8 x 8, each used once."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 8, dtype=dtype) for _ in range(count)])

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.weights)).sum()


def keep(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A hook that sends nothing."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def cpu_us(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return 1e6 * (time.process_time() - start)


def measure(case: str, count: int, rounds: int) -> dict[str, float]:
    """Medians on this rank, in microseconds of CPU time per parameter."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
    options: dict[str, Any] = {"master_dtype": torch.float32} if "master" in case else {}
    nets = [Model(count, dtype) for _ in range(2)]
    models = [DistributedDataParallel(net, gradient_as_bucket_view=True) for net in nets]
    adamw = torch.optim.AdamW(nets[0].parameters(), fused=True)
    ours: Any
    if "ZeroRedundancyOptimizer" in case:
        options = {"parameters_as_bucket_view": True, "fused": True}
        ours = ZeroRedundancyOptimizer(nets[1].parameters(), torch.optim.AdamW, **options)
    else:
        ours = ZeroAdamW(nets[1].parameters(), fused=True, **options)
        if "hook" in case:
            models[1].register_comm_hook(ours, reduce_scatter_hook)
    # What the hook costs is told beside a backward without communication. The fake group cannot all-reduce for DDP.
    if "hook" in case or dist.get_world_size() in FAKE:
        models[0].register_comm_hook(None, keep)
    if "hook" not in case and dist.get_world_size() in FAKE:
        models[1].register_comm_hook(None, keep)
    clip = getattr(ours, "clip_grad_norm_", lambda _: nn.utils.clip_grad_norm_(nets[1].parameters(), 1.0))
    actions: dict[str, Callable[[], Any]] = {
        "torch backward": lambda: models[0]().backward(),
        "backward": lambda: models[1]().backward(),
        "torch clip": lambda: nn.utils.clip_grad_norm_(nets[0].parameters(), 1.0),
        "clip": lambda: clip(1.0),
        "torch step": adamw.step,
        "step": ours.step,
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    gc.disable()  # or it would run in whichever comes first
    for turn in range(rounds + 3):  # DDP rebuilds its buckets in the second backward
        for name, action in actions.items():
            dist.barrier()
            times[name].append(cpu_us(action) / count)
        adamw.zero_grad()
        ours.zero_grad()
        if turn % 20 == 0:
            gc.collect()
    gc.enable()
    return {name: statistics.median(found[3:]) for name, found in times.items()}


def rank_main(rank: int, world_size: int, store: str, case: str, count: int, rounds: int, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if world_size in FAKE:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = measure(case, count, rounds)
    if rank == 0:
        answers.put(found)
    dist.barrier()
    time.sleep(0.2)  # see launch/train.py
    dist.destroy_process_group()


CASES = [
    (1, "float32"),
    (1, "float32, hook"),
    (2, "float32"),
    (2, "float32, hook"),
    (8, "float32"),
    (8, "float32, hook"),
    (64, "float32"),
    (64, "float32, hook"),
    (512, "float32"),
    (1, "bfloat16 + master"),
    (2, "ZeroRedundancyOptimizer"),
]


def table(counts: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each number of parameters and case."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = torch.multiprocessing.get_context("spawn")
    for count in counts:
        for world_size, case in CASES:
            answers = context.SimpleQueue()
            with tempfile.TemporaryDirectory() as folder:
                processes = 1 if world_size in FAKE else world_size
                arguments = (world_size, f"{folder}/store", case, count, rounds, answers)
                torch.multiprocessing.spawn(rank_main, arguments, nprocs=processes)
            found = answers.get()
            yield {
                "parameters": count,
                "W": world_size,
                "case": case,
                "step, us": found["step"],
                "over AdamW's": found["step"] / found["torch step"],
                "clip, us": found["clip"],
                "over torch's": found["clip"] / found["torch clip"],
                "hook, us": found["backward"] - found["torch backward"] if "hook" in case else "",
            }
