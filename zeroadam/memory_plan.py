"""What a training will hold and send, before anything is built: by the code that lays it out, on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from zeroadam.gather.param_bucket import make_buckets, staging_bytes
from zeroadam.layout.shard import shard
from zeroadam.options import Options
from zeroadam.reduce.hook import bf16_reduce_scatter_hook
from zeroadam.state.storage import layout, state_names
from zeroadam.transport import row_rules
from zeroadam.update.master import MASTERS


@dataclass(frozen=True)
class RankBytes:
    """Of one rank, all in bytes."""

    parameters: int
    gradients: int
    moments: int
    master: int  # float32 copies of low-precision parameters, or what they are made of
    steps: int  # the count of steps of each parameter
    staging: int  # staging memory of small parameters for the all-gather
    sent: int  # to other ranks per step, by ring algorithms; not sent where all ranks share a host's memory

    @property
    def total(self) -> int:
        """Held at the end of backward, but for activations."""
        return self.parameters + self.gradients + self.state + self.staging

    @property
    def state(self) -> int:
        return self.moments + self.master + self.steps


def plan(
    params: ParamsT,
    world_size: int,
    *,
    shard_size: int | None = None,
    amsgrad: bool = False,
    master_dtype: torch.dtype | None = None,
    store_param_remainders: bool = False,
    state_dtype: torch.dtype | None = None,
    bucket_cap_mb: float = 25,
    hook: Callable[..., Any] | None = None,
    backend: str = "nccl",
) -> list[RankBytes]:
    """The bytes of each of `world_size` ranks that train with `ZeroAdam`; as it takes them, but for the last two.

    To the byte what a run allocates for as long as it lasts. On top come, with a hook, staging memory of what is being
    reduced: of three parts of up to 40 MB the small gradients, and what is received on gloo or with `ordered_sums`; and
    a few MB of scratch memory
    for updates in another precision than the parameters', or of gradients that are divided.

    Args:
        params: parameters or param groups, [d0, ...] each; on the meta device they need no memory. Those that require
            no gradient are held and not trained.
        shard_size: the ranks over which the state is sharded, if not all: S of the `device_mesh` [R, S].
        hook: the one that DistributedDataParallel is to have; None for its all-reduce.
        backend: nccl or gloo, which can send rows of unequal length.

    Raises:
        ValueError: 8-bit moments whose blocks so many ranks would cut; ranks that are no groups of `shard_size`.
    """
    shards = world_size if shard_size is None else shard_size
    if shards < 1 or world_size % shards:
        raise ValueError(f"{world_size} ranks are no groups of {shards}: give a shard size that divides their number")
    replicas = world_size // shards
    groups = _groups(params)
    every = [param for group in groups for param in group]
    trained = [param for param in every if param.requires_grad]
    options = Options(bucket_cap_mb, master_dtype, store_param_remainders, state_dtype)
    options.check()
    options.check_blocks(trained, shards)
    layouts = [
        (name in MASTERS, layout(param, name, precision))
        for param in trained
        for precision in [options.precision(param)]
        for name in state_names(amsgrad, precision)
    ]
    rules = row_rules(backend, shards)
    buckets = make_buckets(trained, 0, shards, bucket_cap_mb * 2**20, lambda _: rules)
    gradients = sum(param.nbytes for param in trained)
    ranks = []
    for rank in range(shards):
        pieces = [shard(param, shards, rank) for param in trained]
        own = sum(piece.nbytes for piece in pieces)
        gathered = sum(piece.nbytes for piece in pieces if piece.dim() > 0)  # all ranks update the others alike
        if hook is None:
            reduced = 2 * (world_size - 1) * gradients // world_size
        elif hook is bf16_reduce_scatter_hook:
            reduced = sum(2 * (p.numel() - piece.numel()) for p, piece in zip(trained, pieces, strict=True))
        else:
            reduced = gradients - own
        if hook is not None and replicas > 1:  # to the replicas its piece, from where the sum of 1/R of it comes back
            sent = 2 if hook is bf16_reduce_scatter_hook else 0
            wires = [p.numel() * (sent or p.itemsize) + p.numel() * max(p.itemsize, 4) for p in pieces]
            reduced += sum(wires) * (replicas - 1) // replicas
        held = [(is_master, shard(whole, shards, rank).nbytes) for is_master, whole in layouts]
        ranks.append(
            RankBytes(
                parameters=sum(param.nbytes for param in every),
                gradients=gradients,
                moments=sum(size for is_master, size in held if not is_master),
                master=sum(size for is_master, size in held if is_master),
                steps=4 * len(trained),
                staging=staging_bytes(buckets),
                sent=reduced + (shards - 1) * gathered,
            )
        )
    return ranks * replicas


def whole_tensors(
    params: ParamsT,
    world_size: int,
    *,
    amsgrad: bool = False,
    master_dtype: torch.dtype | None = None,
    store_param_remainders: bool = False,
    state_dtype: torch.dtype | None = None,
) -> list[int]:
    """Bytes of state of each rank if every parameter belongs to one, as torch's ZeroRedundancyOptimizer has it.

    It gives the largest parameters away first, each to the rank with the fewest elements so far, group by group.
    """
    options = Options(25, master_dtype, store_param_remainders, state_dtype)
    numels, held = [0] * world_size, [0] * world_size
    for group in _groups(params):
        for param in sorted(group, key=Tensor.numel, reverse=True):
            rank = numels.index(min(numels))
            numels[rank] += param.numel()
            precision = options.precision(param)
            held[rank] += 4 + sum(layout(param, name, precision).nbytes for name in state_names(amsgrad, precision))
    return held


def _groups(params: ParamsT) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = []
    single: list[Tensor] = []
    for item in params:
        if isinstance(item, dict):
            groups.append(list(item["params"]))
        else:
            single.append(item[1] if isinstance(item, tuple) else item)
    return groups + ([single] if single else [])
