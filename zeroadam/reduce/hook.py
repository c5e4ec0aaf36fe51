"""Reduce-scatter in place of DistributedDataParallel's all-reduce, as a communication hook.

After backward, `p.grad` holds the SUM over the ranks in the piece that this rank owns, and zero elsewhere. A sum and
not the mean, so that another backward still adds up: the owner has S1 + g, the others 0 + g, their sum is S1 + S2, and
`step()` divides by W. A 0-d parameter belongs to all ranks and has the mean on all: W times S1 / W adds up. In float16,
where the backend itself adds, the owner has the mean: see `zeroadam.reduce.means`.

Messages are under way during backward and finished by a callback at its end. The future handed to DDP is complete from
the start: it only tells DDP where the gradients are, which is where they were.
"""

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import ParamsT

from zeroadam._compat import current_graph_task_id, queue_callback
from zeroadam.layout.packing import direct_rows, is_dense, split_by_size, staged_bytes
from zeroadam.layout.shard import shard
from zeroadam.reduce.float_sums import find_sums
from zeroadam.reduce.grad_bucket import GradBucket
from zeroadam.reduce.join import SumsInJoin, in_join
from zeroadam.reduce.means import Means
from zeroadam.reduce.ownership import Owner, Reduced, held_params, owners_of, reduced_of
from zeroadam.reduce.replicas import ReplicaSums
from zeroadam.reduce.side_stream import SideStreams
from zeroadam.report import Meter
from zeroadam.transport import Transport, Transports
from zeroadam.transport.calls import BACKWARD

# Parts of DDP buckets whose reduction may be under way at once; each has staging memory of its own.
STAGING_SLOTS = 3
PART_BYTES, WHOLE_BYTES = 25 * 2**20, 40 * 2**20  # a bucket of DDP's usual size and its last gradient is one part


def reduce_scatter_hook(optimizer: Owner | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum gradients onto the rank that owns them: `model.register_comm_hook(optimizer, reduce_scatter_hook)`.

    The model is a DistributedDataParallel with `gradient_as_bucket_view=True`, whose trained parameters are held by
    this optimizer or others of its process group. Register it before the first backward. None for the optimizer: that
    which holds the bucket. Each rank sends (W-1)/W of the gradients' bytes per backward. p.grad: [d0, ...], of which
    [c, ...] are the sum over the ranks, on gloo in rank order (host by host) and float32, the rest zero. 0-d: the mean.

    Raises:
        RuntimeError: in `backward()`: no `gradient_as_bucket_view`, a parameter of no such optimizer, `model.join()`.
    """
    return _reduce(optimizer, bucket, None)


def bf16_reduce_scatter_hook(optimizer: Owner | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """`reduce_scatter_hook` that sends each rank's gradients rounded to bfloat16, half the bytes of float32.

    The sum of the rounded gradients is taken in float32 (on gloo) and stored in the dtype of the gradient. The sum of a
    host with several ranks is rounded as well when it goes to others, unless the optimizer has `ordered_sums=True`.
    """
    return _reduce(optimizer, bucket, torch.bfloat16)


def _reduce(
    optimizer: Owner | None, bucket: dist.GradBucket, wire_dtype: torch.dtype | None
) -> torch.futures.Future[torch.Tensor]:
    owner = owners_of(bucket.parameters()[:1])[0] if optimizer is None else optimizer
    done: torch.futures.Future[Tensor] = owner.reduction.reduce(bucket, owner, wire_dtype)
    return done


class Reduction:
    """What is being reduced, a few MB at a time, while backward goes on."""

    def __init__(self, group: dist.ProcessGroup, transports: Transports, meter: Meter, in_float32: bool) -> None:
        self.process_group, self.transports, self.meter, self.in_float32 = group, transports, meter, in_float32
        self.under_way: deque[GradBucket] = deque()
        self.finished: list[GradBucket] = []
        self.backward = -1  # the last one seen, by its number in the autograd engine
        # The parts of a DDP bucket by its address, from the second time on that it comes. They keep its memory alive,
        # which DDP frees after the first backward to make other buckets.
        self.known: dict[int, list[GradBucket]] = {}
        self.seen: set[int] = set()
        self.started = 0  # staged parts in this backward; by which memory is chosen, alike on all ranks
        self.memory: dict[tuple[torch.device, int], Tensor] = {}
        self.streams = SideStreams()
        self.replicas = ReplicaSums(group, transports.replica, self._fail)
        self.sums_in_join, self.means = SumsInJoin(self._fail), Means(group)
        # In `Join`, what a rank without inputs gets for its pieces: DDP does not put it into p.grad there.
        self.joined: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def reduce(
        self, bucket: dist.GradBucket, owner: Owner, wire_dtype: torch.dtype | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Start to reduce one bucket; finish here what has its staging memory, the rest at the end of backward.

        owner: the optimizer with which the hook was registered.
        """
        joined, backward = in_join(owner), current_graph_task_id()
        self.sums_in_join.owner = weakref.ref(owner) if joined else None
        if backward != -1:
            parts = self.known.get(bucket.buffer().data_ptr()) or self._know(bucket, owner, wire_dtype)
            if backward != self.backward:
                self._refuse_half_a_backward()
                self.transports.begin(BACKWARD)
                self.backward = backward
                queue_callback(self.finish)
        elif joined:
            parts = self._parts(bucket, wire_dtype)
            if not self.joined:
                self.transports.begin(BACKWARD)
            for one in (one for part in parts for one in part.float_sums):
                one.restart()  # what this rank may have had before is no part of what the others sum
            self.joined += [pair for part in parts for pair in zip(part.params, part.grads, strict=True)]
        else:
            raise RuntimeError(
                "model.join() leaves out the optimizer, to which ranks without inputs must contribute as well: "
                "use torch.distributed.algorithms.Join([model, optimizer])"
            )
        with self._ends_together(), self.streams.beside(bucket.buffer().device):
            for part in parts:
                self.replicas.empty(part.params)
                while part.staged and sum(other.staged for other in self.under_way) == STAGING_SLOTS:
                    self._finish_first()
                with self.meter.phase("reduce_scatter"):
                    part.start(self._memory(part))
                self.started += part.staged
                self.meter.count(*part.bytes_moved)
                self.under_way.append(part)
        buffer = bucket.buffer()
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer)
        return done

    @torch.no_grad()
    def finish(self) -> None:
        """Finish all that is under way, and remember what the gradients are now."""
        with self._ends_together():
            while self.under_way:
                with self.streams.beside(self.under_way[0].grads[0].device):
                    self._finish_first()
            self.streams.join()
        for part in self.finished:
            part.remember()
            self.sums_in_join.note(part.params)
            self.replicas.note(part.params)
        self.finished, self.started = [], 0

    @contextlib.contextmanager
    def _ends_together(self) -> Iterator[None]:
        """An error in here ends the backward of the other ranks as well."""
        try:
            yield
        except BaseException as error:
            self.under_way.clear()
            self.transports.fail(error)
            raise

    def _finish_first(self) -> None:
        with self.meter.phase("reduce_scatter"):
            self.under_way[0].finish()
        self.finished.append(self.under_way.popleft())

    @property
    def used(self) -> bool:
        """Whether the hook has run."""
        return bool(self.seen or self.joined)

    def forget_others(self) -> None:
        """Let go of buckets with parameters that no optimizer holds any more."""
        held = held_params() if self.known else set()
        for address, parts in list(self.known.items()):
            if not all(id(param) in held for part in parts for param in part.params):
                del self.known[address]

    def held_bytes(self) -> int:
        """The bytes of the DDP buckets that are known; DDP holds those that it still uses itself."""
        buffers = {address: parts[0].grads[0].untyped_storage().nbytes() for address, parts in self.known.items()}
        return sum(buffers.values())

    def take_joined(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters and gradients that came to this rank without inputs since the last call."""
        self.finish()
        taken, self.joined = self.joined, []
        return taken

    def _refuse_half_a_backward(self) -> None:
        """Raise where an earlier backward ended in an error: its reductions would end in the gradients of this one."""
        if self.under_way:
            self._fail(
                "an earlier backward ended in an error while gradients were being reduced: build DDP and the optimizer "
                "anew, from a checkpoint; if no backward has failed, give torch.utils.checkpoint use_reentrant=False"
            )

    def _fail(self, message: str) -> NoReturn:
        """Raise RuntimeError, here and on the other ranks."""
        with self._ends_together():
            raise RuntimeError(message)

    def _know(self, bucket: dist.GradBucket, owner: Owner, wire_dtype: torch.dtype | None) -> list[GradBucket]:
        """Lay a new bucket out, and forget those that had its parameters before DDP rebuilt them."""
        self._check_views(bucket)
        params = bucket.parameters()
        for holder in owners_of(params, self.process_group, owner):
            # torch.amp.GradScaler then leaves unscaling and infinities to step(), which refuses: see there.
            holder._step_supports_amp_scaling = True
        old = {reduced.storage for reduced in map(reduced_of, params) if reduced is not None}
        self.known = {address: parts for address, parts in self.known.items() if address not in old}
        parts, address = self._parts(bucket, wire_dtype), bucket.buffer().data_ptr()
        if address in self.seen:
            self.known[address] = parts
        self.seen.add(address)
        return parts

    def _parts(self, bucket: dist.GradBucket, wire_dtype: torch.dtype | None) -> list[GradBucket]:
        """A bucket in parts of bounded size: before DDP rebuilds its buckets there is just one."""
        grads = {}
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            # DDP lays gradients out in the strides that their parameters had when it made the bucket, but
            # GradBucket.gradients() does not tell.
            before = reduced_of(param)
            if param.grad is not None and param.grad.data_ptr() == grad.data_ptr():
                grads[param] = grad.as_strided(param.shape, param.grad.stride())
            elif before is not None:
                grads[param] = grad.as_strided(param.shape, before.strides[id(param)])
            else:
                grads[param] = grad.as_strided(param.shape, param.stride()) if is_dense(param) else grad
        buffer = bucket.buffer()
        transport = self.transports.of(buffer.device)
        nbytes = {id(param): self._staged_bytes(grad, wire_dtype, transport) for param, grad in grads.items()}
        cap_bytes = WHOLE_BYTES if sum(nbytes.values()) <= WHOLE_BYTES else PART_BYTES
        runs = split_by_size(list(grads), cap_bytes, lambda param: nbytes[id(param)])
        # One note for all parts: the gradients of a bucket share their version counter.
        own = [shard(grad, self.process_group.size(), self.process_group.rank()) for grad in grads.values()]
        strides = {id(param): grad.stride() for param, grad in grads.items()}
        # Where the backend adds, which also sums otherwise on every rank, it does so in the dtype of the gradients.
        means = buffer.dtype == torch.float16 and not transport.same_on_all_ranks
        sums = find_sums(grads, self.process_group, self.transports.size, self.in_float32)
        reduced = Reduced(buffer.untyped_storage().data_ptr(), self.process_group.group_name, own, strides, means, sums)
        common = (self.process_group, transport, wire_dtype, reduced, self.means, self.transports.size)
        return [GradBucket(params, [grads[p] for p in params], *common) for params in runs]

    def _staged_bytes(self, grad: Tensor, wire_dtype: torch.dtype | None, transport: Transport) -> int:
        """What one gradient takes of the staging memory of its part, or of cache where the host makes the sums."""
        world_size, as_it_is = self.process_group.size(), wire_dtype in (None, grad.dtype)
        in_place = transport.sums_on_device and not transport.senders and as_it_is
        if in_place and direct_rows(grad, world_size, transport.rules) is not None:
            return 0
        return staged_bytes(grad, world_size)

    def _memory(self, part: GradBucket) -> Tensor:
        slot = (part.grads[0].device, self.started % STAGING_SLOTS)
        if slot not in self.memory or self.memory[slot].numel() < part.memory_bytes:
            self.memory[slot] = torch.empty(part.memory_bytes, dtype=torch.uint8, device=slot[0])
        return self.memory[slot]

    def _check_views(self, bucket: dist.GradBucket) -> None:
        for param in bucket.parameters():
            if param.grad is not None and param.grad.untyped_storage().data_ptr() != bucket.buffer().data_ptr():
                raise RuntimeError(
                    "reduce_scatter_hook works on DDP's buckets: build the model with "
                    "DistributedDataParallel(..., gradient_as_bucket_view=True)"
                )


Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[torch.Tensor]]


def params_of(params: ParamsT | nn.Module) -> ParamsT:
    """The parameters of a model with the names that they have inside DistributedDataParallel; all else as it is."""
    if isinstance(params, DistributedDataParallel):
        params = params.module
    return list(params.named_parameters()) if isinstance(params, nn.Module) else params


def register_hook(model: nn.Module, optimizer: Owner, hook: Hook) -> None:
    """Register a hook for the optimizer of a model, if that is a DistributedDataParallel with bucket views.

    Raises:
        RuntimeError: the model has a hook already, or is of another process group.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    if not model.gradient_as_bucket_view:
        warnings.warn(
            "no hook was registered, so DDP sends 3/2 of the bytes: build the model with "
            "DistributedDataParallel(..., gradient_as_bucket_view=True), or pass hook=None",
            stacklevel=3,
        )
        return
    if model.process_group != optimizer.all_ranks:
        raise RuntimeError("the model is of another process group than the optimizer, so hook=None must be passed")
    try:
        model.register_comm_hook(optimizer, hook)
    except RuntimeError as error:
        raise RuntimeError(f"the model takes no hook, so pass hook=None: {error}") from None
