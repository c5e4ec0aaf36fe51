"""Reduce-scatter in place of DistributedDataParallel's all-reduce, as a communication hook.

After backward, `p.grad` holds the SUM over the ranks in the piece that this rank owns, and zero elsewhere. A sum and
not the mean, so that another backward still adds up: the owner has S1 + g, the others 0 + g, and their sum is S1 + S2.
`step()` divides by W. What other code does to such gradients between backward and step (clip them by this rank's norm,
say) would be wrong in silence, so the hook remembers the version counter of what it wrote, and `step()` compares.

The works of a bucket are under way while backward goes on; the last bucket's hook finishes them all, so that the future
handed to DDP is complete already.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zeroadam.bucket import Bucket
from zeroadam.collectives import is_gloo, reduce_scatter, sum_rows
from zeroadam.shard import shard

if TYPE_CHECKING:
    from zeroadam.optimizer import ZeroAdam

# DDP buckets whose reduction may be under way at once; each has staging memory of its own.
IN_FLIGHT = 3


def reduce_scatter_hook(optimizer: "ZeroAdam", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum gradients onto the rank that owns them: `model.register_comm_hook(optimizer, reduce_scatter_hook)`.

    The model is a DistributedDataParallel with `gradient_as_bucket_view=True` on the optimizer's process group; all its
    trained parameters are held by this optimizer or others of that group. Register it before the first backward.
    Each rank sends (W-1)/W of the gradients' bytes per backward. p.grad: [d0, ...] -> [d0, ...], of which [c, ...]
    are the sum over the ranks, on gloo taken in rank order and float32, and the rest zero.

    Raises, from `backward()`:
        RuntimeError: `gradient_as_bucket_view=False`, a parameter of no such optimizer, or `model.join()` without it.
    """
    return optimizer.reduction.reduce(bucket)


def bf16_reduce_scatter_hook(optimizer: "ZeroAdam", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """`reduce_scatter_hook` that sends each rank's gradients rounded to bfloat16, half the bytes of float32.

    The sum of the rounded gradients is taken in float32 (on gloo) and stored in the dtype of the gradient.
    """
    return optimizer.reduction.reduce(bucket, torch.bfloat16)


@dataclass
class Reduced:
    """What the hook last wrote to the gradients of one DDP bucket: where, which version, summed over whom."""

    storage: int
    version: int
    process_group: dist.ProcessGroup

    def still_in(self, grad: Tensor) -> bool:
        return grad.untyped_storage().data_ptr() == self.storage and grad._version == self.version


# Ownership depends on shape and W alone: an optimizer can step on what was reduced by a hook on another one.
HELD: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> process group of the optimizer that holds it
REDUCED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> Reduced


def summed_over(param: Tensor, process_group: dist.ProcessGroup) -> int:
    """By what to divide `param.grad` for the mean over the ranks: W after the hook, 1 where it was not used.

    Raises:
        RuntimeError: the gradient is not what the hook made it, or was summed over another process group.
    """
    reduced: Reduced | None = REDUCED.get(param)
    if reduced is None or param.grad is None:
        return 1
    if reduced.process_group != process_group:
        raise RuntimeError(
            "gradients were summed over another process group than that of the optimizer that holds the parameters: "
            "register the hook with an optimizer of the same group"
        )
    if not reduced.still_in(param.grad):
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(param.shape)} was changed after reduce_scatter_hook summed "
            "it, which only its owner would notice: clip with optimizer.clip_grad_norm_(), not with "
            "torch.nn.utils.clip_grad_norm_(); scale with zeroadam.GradScaler; end accumulation with a backward "
            "outside of no_sync()"
        )
    return process_group.size()


def accept_changes(params: Iterable[Tensor]) -> None:
    """Take the gradients as they are now for what the hook wrote; for changes that all ranks make alike."""
    for param in params:
        if param.grad is not None and param in REDUCED:
            REDUCED[param].version = param.grad._version


class Reduction:
    """What is being reduced, bucket by bucket, while backward goes on."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self.under_way: deque[_BucketReduction] = deque()
        self.started = 0
        self.known: dict[int, _BucketReduction] = {}  # by the address of DDP's bucket
        self.memory: dict[tuple[torch.device, int], Tensor] = {}
        # In `Join`, what a rank without inputs gets for its pieces: DDP does not put it into p.grad there.
        self.in_join = False
        self.joined: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def reduce(
        self, bucket: dist.GradBucket, wire_dtype: torch.dtype | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Start to reduce one bucket, finish the one that is `IN_FLIGHT` behind, and all of them after the last."""
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            self._check_views(bucket)
            reduction = self.known.get(bucket.buffer().data_ptr()) or self._know(bucket, wire_dtype)
        elif self.in_join:
            reduction = _BucketReduction(self, bucket, wire_dtype)
            self.joined += zip(bucket.parameters(), bucket.gradients(), strict=True)
        else:
            raise RuntimeError(
                "model.join() leaves out the optimizer, to which ranks without inputs must contribute as well: "
                "use torch.distributed.algorithms.Join([model, optimizer])"
            )
        if len(self.under_way) == IN_FLIGHT:
            self.under_way.popleft().finish()
        reduction.start(self._staging(reduction))
        self.under_way.append(reduction)
        while bucket.is_last() and self.under_way:
            self.under_way.popleft().finish()
        done: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[reduction.buffer.device] if reduction.buffer.is_cuda else None
        )
        done.set_result(bucket.buffer())
        return done

    @property
    def used(self) -> bool:
        """Whether the hook has run."""
        return self.started > 0

    def take_joined(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters and gradients that came to this rank without inputs since the last call."""
        taken, self.joined = self.joined, []
        return taken

    def _know(self, bucket: dist.GradBucket, wire_dtype: torch.dtype | None) -> "_BucketReduction":
        """Lay a new bucket out, and forget those that had its parameters before DDP rebuilt them."""
        old = {REDUCED[param].storage for param in bucket.parameters() if param in REDUCED}
        self.known = {address: reduction for address, reduction in self.known.items() if address not in old}
        reduction = _BucketReduction(self, bucket, wire_dtype)
        for param in bucket.parameters():
            REDUCED[param] = reduction.reduced
        self.known[bucket.buffer().data_ptr()] = reduction
        return reduction

    def _staging(self, reduction: "_BucketReduction") -> Tensor:
        key = (reduction.buffer.device, self.started % IN_FLIGHT)
        self.started += 1
        if key not in self.memory or self.memory[key].numel() < reduction.memory_bytes:
            self.memory[key] = torch.empty(reduction.memory_bytes, dtype=torch.uint8, device=key[0])
        return self.memory[key]

    def _check_views(self, bucket: dist.GradBucket) -> None:
        for param in bucket.parameters():
            if param.grad is not None and param.grad.untyped_storage().data_ptr() != bucket.buffer().data_ptr():
                raise RuntimeError(
                    "reduce_scatter_hook works on DDP's buckets: build the model with "
                    "DistributedDataParallel(..., gradient_as_bucket_view=True)"
                )


class _BucketReduction:
    """One DDP bucket's gradients: large pieces are sent from where they lie, the others packed, as for the gather."""

    def __init__(self, reduction: Reduction, bucket: dist.GradBucket, wire_dtype: torch.dtype | None) -> None:
        self.process_group, self.rank = reduction.process_group, reduction.rank
        self.buffer = bucket.buffer()
        gloo = is_gloo(self.process_group, self.buffer.device.type)
        self.pieces = Bucket(
            bucket.gradients(), 0, self.rank, reduction.world_size, equal_rows=not gloo, wire_dtype=wire_dtype
        )
        self.senders = reduction.world_size - 1 if gloo else 0
        own = sum(shard(grad, reduction.world_size, self.rank).numel() for grad in self.pieces.direct)
        self.received_numel = self.senders * (own + self.pieces.row_numels[self.rank])
        # Rows start at a multiple of eight bytes.
        self.memory_bytes = -(-self.pieces.staging_bytes // 8) * 8 + self.received_numel * self.pieces.dtype.itemsize
        self.reduced = Reduced(self.buffer.data_ptr(), -1, self.process_group)
        for param in bucket.parameters():
            if HELD.get(param) != self.process_group:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} is reduced by reduce_scatter_hook, but no ZeroAdam of "
                    "the same process group holds it: give all the model's trained parameters to such optimizers"
                )

    def start(self, memory: Tensor) -> None:
        self.pieces.use_staging(memory)
        self.pieces.pack_all()
        begin = self.memory_bytes - self.received_numel * self.pieces.dtype.itemsize
        received = memory[begin : self.memory_bytes].view(self.pieces.dtype)
        self.exchanges: list[tuple[list[Tensor], list[Tensor]]] = []
        self.works: list[dist.Work] = []
        for rows in self.pieces.rows():
            numel = self.senders * rows[self.rank].numel()
            incoming = list(received[:numel].view(self.senders, -1)) if self.senders else []
            received = received[numel:]
            self.works += reduce_scatter(rows, incoming, self.process_group)
            self.exchanges.append((rows, incoming))

    def finish(self) -> None:
        for work in self.works:
            work.wait()
        for rows, received in self.exchanges[: len(self.pieces.direct)]:
            total = sum_rows(rows[self.rank], received, self.rank)
            for rank, row in enumerate(rows):
                if rank != self.rank:
                    row.zero_()
                elif total is not row:
                    row.copy_(total)
        if self.pieces.packed:
            rows, received = self.exchanges[-1]
            self.pieces.unpack_own(sum_rows(rows[self.rank], received, self.rank))
        self.reduced.version = self.buffer._version
