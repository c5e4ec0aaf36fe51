"""What `launch/benchmark.py` compares: the same model trained by each way there is of doing it."""

import argparse
import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import now, sent_bytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from train import GPT, Block, state_bytes

from zeroadam import ZeroAdamW, bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.layout.packing import direct_rows
from zeroadam.transport import choose
from zeroadam.transport.calls import Calls
from zeroadam.transport.shared_memory import SharedMemory

REFERENCE = "ddp + adamw"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}


def ddp(gpt: nn.Module, bucket_cap_mb: float = 25) -> DistributedDataParallel:
    return DistributedDataParallel(gpt, gradient_as_bucket_view=True, bucket_cap_mb=bucket_cap_mb)


def adamw(gpt: nn.Module, bucket_cap_mb: float = 25, **options: Any) -> tuple[nn.Module, Any]:
    model = ddp(gpt, bucket_cap_mb)
    return model, torch.optim.AdamW(model.parameters(), **OPTIONS, **options)


def without_communication(gpt: nn.Module) -> tuple[nn.Module, Any]:
    """DDP that sends nothing: each rank trains a model of its own. What the computation alone costs."""

    def keep(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model = ddp(gpt)
    model.register_comm_hook(None, keep)
    return model, torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True)


def zero_redundancy(gpt: nn.Module, view: bool) -> tuple[nn.Module, Any]:
    model, options = ddp(gpt), {**OPTIONS, "parameters_as_bucket_view": view}
    return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **options)


def zeroadam(
    gpt: nn.Module, hook: Callable[..., Any] | None, gather_in_forward: bool = False, **options: Any
) -> tuple[nn.Module, Any]:
    model = ddp(gpt)
    optimizer = ZeroAdamW(model.parameters(), **OPTIONS, **options)
    if hook is not None:
        model.register_comm_hook(optimizer, hook)
    if gather_in_forward:
        optimizer.gather_in_forward(model)
    return model, optimizer


def low_precision(gpt: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """In bfloat16 with float32 copies."""
    return zeroadam(gpt.bfloat16(), reduce_scatter_hook, master_dtype=torch.float32, **options)


def hybrid(gpt: nn.Module, hook: Callable[..., Any], bucket_cap_mb: float = 25) -> tuple[nn.Module, Any]:
    """State cut over the ranks of a host, and the same on each host."""
    model, local = ddp(gpt, bucket_cap_mb), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    shape = (dist.get_world_size() // local, local)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return model, ZeroAdamW(model, **OPTIONS, device_mesh=mesh, hook=hook)


def fsdp1(gpt: nn.Module) -> tuple[nn.Module, Any]:
    """Its gradients and state are sharded, its parameters not between forward and backward."""
    device = next(gpt.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            gpt,
            sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            device_id=device,
            use_orig_params=True,
        )
    return model, torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True)


def fsdp2(gpt: nn.Module) -> tuple[nn.Module, Any]:
    mesh = init_device_mesh(next(gpt.parameters()).device.type, (dist.get_world_size(),))
    for module in gpt.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
    fully_shard(gpt, mesh=mesh, reshard_after_forward=False)
    return gpt, torch.optim.AdamW(gpt.parameters(), **OPTIONS, fused=True)


def fairscale(gpt: nn.Module) -> tuple[nn.Module, Any]:
    from fairscale.optim.oss import OSS

    model = ddp(gpt)
    return model, OSS(model.parameters(), optim=torch.optim.AdamW, fused=True, **OPTIONS)


class DeepSpeed:
    """Its engine does forward, backward and step; behind the methods that the others have."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        pass


def deepspeed(gpt: nn.Module, stage: int) -> tuple[nn.Module, Any]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(gpt.parameters(), **OPTIONS, fused=True)
    engine, *_ = deepspeed.initialize(model=gpt, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, DeepSpeed(engine)


IMPLEMENTATIONS: dict[str, Callable[[nn.Module], tuple[nn.Module, Any]]] = {
    REFERENCE: lambda gpt: adamw(gpt, fused=True),
    "ddp + adamw, foreach": lambda gpt: adamw(gpt, foreach=True),
    "ddp + adamw, buckets of 5 MB": lambda gpt: adamw(gpt, 5, fused=True),
    "no communication": without_communication,
    "zero_redundancy": lambda gpt: zero_redundancy(gpt, view=False),
    "zero_redundancy, bucket view": lambda gpt: zero_redundancy(gpt, view=True),
    "zeroadam": lambda gpt: zeroadam(gpt, None),
    "zeroadam + hook": lambda gpt: zeroadam(gpt, reduce_scatter_hook),
    "zeroadam + bf16 hook": lambda gpt: zeroadam(gpt, bf16_reduce_scatter_hook),
    "zeroadam + hook, gather in forward": lambda gpt: zeroadam(gpt, reduce_scatter_hook, True),
    "zeroadam + bf16 hook, gather in forward": lambda gpt: zeroadam(gpt, bf16_reduce_scatter_hook, True),
    "zeroadam + hook, bfloat16": low_precision,
    "zeroadam + hook, bfloat16, float32 sums": lambda gpt: low_precision(gpt, grad_dtype=torch.float32),
    "zeroadam, hybrid": lambda gpt: hybrid(gpt, reduce_scatter_hook),
    "zeroadam, hybrid, buckets of 5 MB": lambda gpt: hybrid(gpt, reduce_scatter_hook, 5),
    "zeroadam, hybrid, bf16 hook": lambda gpt: hybrid(gpt, bf16_reduce_scatter_hook),
    "fsdp1, SHARD_GRAD_OP": fsdp1,
    "fsdp2": fsdp2,
    "fairscale OSS": fairscale,
    "deepspeed, stage 1": lambda gpt: deepspeed(gpt, 1),
    "deepspeed, stage 2": lambda gpt: deepspeed(gpt, 2),
}
NEEDED = {"fairscale OSS": "fairscale", "deepspeed, stage 1": "deepspeed", "deepspeed, stage 2": "deepspeed"}


def installed() -> list[str]:
    """The implementations that can be compared here."""
    return [name for name in IMPLEMENTATIONS if name not in NEEDED or importlib.util.find_spec(NEEDED[name])]


def bare_copy(numel: int, device: torch.device) -> Callable[[], Any]:
    source, target = torch.zeros(numel, device=device), torch.zeros(numel, device=device)
    return lambda: target.copy_(source)


def bare_adam(numel: int, device: torch.device) -> Callable[[], Any]:
    param = torch.zeros(-(-numel // dist.get_world_size()), device=device, requires_grad=True)
    param.grad = torch.zeros_like(param)
    return torch.optim.AdamW([param], **OPTIONS, fused=True).step


def bare_transfer(numel: int, device: torch.device) -> Callable[[], Any]:
    """To each rank the gradients of its share, from each its share of the parameters: the fewest bytes there are."""
    group = dist.group.WORLD
    assert group is not None
    transport = choose(group, device, Calls())
    rows = direct_rows(torch.zeros(numel, device=device), group.size(), transport.rules)
    assert rows is not None, "numel must be a multiple of W for this backend"
    scratch = [[torch.empty_like(rows[group.rank()]) for _ in range(transport.senders)]]
    reduce, gather = transport.prepare_reduce([rows], scratch), transport.prepare_gather([rows])

    def transfer() -> None:
        reduce()()
        for wait in gather():
            wait()

    return transfer


# What no implementation can do without, alone and with nothing else to wait for.
LIMITS: dict[str, Callable[[int, torch.device], Callable[[], Any]]] = {
    "limit: a copy of the parameters": bare_copy,
    "limit: AdamW(fused) on 1/W": bare_adam,
    "limit: the bytes there and back": bare_transfer,
}


class Limit:
    """One of LIMITS, which takes turns like the implementations."""

    def __init__(self, name: str, numel: int, device: torch.device) -> None:
        self.name, self.device = name, device
        self.run = LIMITS[name](numel, device)
        self.steps: list[dict[str, float]] = []

    def step(self, tokens: Tensor) -> None:  # noqa: ARG002
        dist.barrier()
        sent, start, cpu = sent_bytes(), now(self.device), time.process_time()
        self.run()
        end_cpu = time.process_time()
        dist.barrier()
        end = now(self.device)
        self.steps.append({"wall": end - start, "CPU": end_cpu - cpu, "sent": sent_bytes() - sent, "shared": 0})


class Implementation:
    """A model with its optimizer, and what its steps took on this rank."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device) -> None:
        self.name = name
        torch.manual_seed(0)
        gpt = GPT(args.width, args.layers, args.width // 64, args.context).to(device)
        self.model, self.optimizer = IMPLEMENTATIONS[name](gpt)
        self.steps: list[dict[str, float]] = []

    def step(self, tokens: Tensor) -> None:
        """Take the step that the gradients of the last call are for, and make new ones.

        In this order, because an all-gather may go on while the next forward runs. The time is that until all ranks
        are done: where they share cores, one that gets its core late would measure less than it takes.
        """
        dist.barrier()
        sent, start, cpu = sent_bytes(), now(tokens.device), time.process_time()
        if self.steps:
            self.optimizer.step()
            self.optimizer.zero_grad()
        middle, middle_cpu = now(tokens.device), time.process_time()
        loss = F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        if isinstance(self.optimizer, DeepSpeed):
            self.optimizer.engine.backward(loss)
        else:
            loss.backward()
        end_cpu = time.process_time()
        dist.barrier()  # all have received what has been sent
        end = now(tokens.device)
        self.steps.append(
            {
                "wall": end - start,
                "forward and backward": end - middle,
                "step": middle - start,
                "CPU": end_cpu - cpu,
                "CPU of step": middle_cpu - cpu,
                "sent": sent_bytes() - sent,
                "shared": self.shared_bytes(),
            }
        )

    def shared_bytes(self) -> int:
        """That this rank has given to others through shared memory, from the end of one `step()` to that of the next.

        For several hosts with several ranks this is 0: what goes through the memory of a host is not told apart there.
        """
        if not isinstance(self.optimizer, ZeroAdamW):
            return 0
        transport = self.optimizer._transports.of(next(self.model.parameters()).device)
        return self.optimizer.report().sent if isinstance(transport, SharedMemory) else 0

    def parameters(self) -> list[Tensor]:
        """In full [d0, ...], in the order of the model. A collective."""
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                return [p.detach().clone() for p in self.model.parameters()]
        return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in self.model.parameters()]

    def state_bytes(self) -> int:
        """Of Adam's moments on this rank."""
        optimizer = self.optimizer
        if isinstance(optimizer, DeepSpeed):
            optimizer = optimizer.engine.optimizer
        return state_bytes(getattr(optimizer, "optim", getattr(optimizer, "optimizer", optimizer)))
