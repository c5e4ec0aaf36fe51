"""Parameters whose pieces are updated, and then gathered, together.

Most of a model's bytes lie in large pieces that are one run of memory. These travel directly from and into the
parameter. The others are packed into a staging area, see `zeroadam.layout.packing`. Adam runs on a parameter itself or,
if it is packed, on its slot in this rank's row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zeroadam.layout.packing import Packing, direct_rows, is_packed, split_by_size, staged_bytes
from zeroadam.layout.rows import RowRules, Rows
from zeroadam.layout.shard import shard
from zeroadam.report import Meter
from zeroadam.transport import Transport

# Buckets that may be packed and under way at once; each of them has staging memory of its own.
STAGING_SLOTS = 3


class ParamBucket:
    """Some parameters of one dtype and device.

    Args:
        params: of any shape [d0, ...].
        rules: of the transport on which they will travel.
    """

    def __init__(self, params: Sequence[Tensor], rank: int, world_size: int, rules: RowRules) -> None:
        self.rules, self.rank, self.world_size = rules, rank, world_size
        self.params = list(params)
        self.dtype, self.device = params[0].dtype, params[0].device
        tensors = [param.detach() for param in params]
        # Parameters that travel directly, and their rows. What every rank updates for itself does not travel at all.
        direct = [direct_rows(tensor, world_size, rules) for tensor in tensors]
        self.direct = [(p, rows) for p, rows in zip(params, direct, strict=True) if rows is not None]
        self.packed = [param for param in params if is_packed(param.detach(), world_size, rules)]
        self.packing = Packing([param.detach() for param in self.packed], world_size, rank, self.dtype)
        self.staging_bytes = self.packing.nbytes
        self.in_forward: list[bool] | None = None  # which of its gathers a forward waits for, once that is known
        # Elements that the first rank updates, which has the largest piece of each, and all ranks together.
        self.fullest = sum(shard(tensor, world_size, 0).numel() for tensor in tensors)
        self.total = sum(tensor.numel() if tensor.dim() > 0 else world_size for tensor in tensors)
        # Bytes of each rank's rows.
        packed_numels = self.packing.sent_numels(rules)
        direct_numels = [sum(rows.numels[r] for _, rows in self.direct) for r in range(world_size)]
        row_bytes = [self.dtype.itemsize * sum(both) for both in zip(direct_numels, packed_numels, strict=True)]
        # (sent, received) by this rank when it sends its rows to all others.
        self.bytes_moved = ((world_size - 1) * row_bytes[rank], sum(row_bytes) - row_bytes[rank])

    def use(self, staging: Tensor, transport: Transport) -> None:
        """Prepare everything that a step needs; `staging` is uint8 [staging_bytes] or more."""
        self.packing.use(staging, self.rules)
        self.exchanges: list[Rows] = [rows for _, rows in self.direct] + ([self.packing.rows] if self.packed else [])
        self.groups: list[tuple[list[Tensor], Callable[[], None] | None]] = [([p], None) for p, _ in self.direct]
        if self.packed:
            self.groups.append((self.packed, self.packing.unpack))
        self.waits_in_forward = transport.waits_in_forward
        self._start = transport.prepare_gather(self.exchanges) if self.exchanges else list
        slots = dict(zip(map(id, self.packed), self.packing.own_slots, strict=True))
        self.pieces = [slots.get(id(p), shard(p.detach(), self.world_size, self.rank)) for p in self.params]

    def pack(self) -> None:
        """Copy this rank's pieces of the packed parameters into its row, where they are updated."""
        self.packing.pack_own()

    def start_gather(self, meter: Meter) -> "list[Gather]":
        """Send this rank's rows and receive the others'."""
        meter.count(*self.bytes_moved)
        waits = self._start()
        return [Gather(params, wait, unpack) for (params, unpack), wait in zip(self.groups, waits, strict=True)]


class Gather:
    """Parameters [d0, ...] of which the other ranks' pieces are on their way.

    `finish` may be called again: on a GPU each stream that reads them has to wait.
    """

    def __init__(self, params: Sequence[Tensor], wait: Callable[[], None], unpack: Callable[[], None] | None) -> None:
        self.params, self.wait, self.unpack, self.done = params, wait, unpack, False

    def finish(self) -> None:
        stream = current_stream(self.params[0].device)
        if not self.done:
            self.done = True
            self.wait()
            if self.unpack is not None:
                self.unpack()
            if stream is not None:
                self.stream, self.arrived = stream, stream.record_event()
        elif stream is not None and stream != self.stream:
            stream.wait_event(self.arrived)


def current_stream(device: torch.device) -> torch.Stream | None:
    """That on which operators on a device are launched now; None where there are none."""
    return None if device.type in ("cpu", "meta") else torch.accelerator.current_stream(device)


def make_buckets(
    params: Sequence[Tensor], rank: int, world_size: int, cap_bytes: float, rules: Callable[[Tensor], RowRules]
) -> list[ParamBucket]:
    """Buckets of at most `cap_bytes`, or of one parameter, in the order of their first ones, as a forward needs them.

    Those that pack nothing apart, as they need not wait for staging memory.

    rules: of the transport for a parameter.
    """
    packed = [is_packed(param.detach(), world_size, rules(param)) for param in params]
    staged, direct = ([p for p, is_one in zip(params, packed, strict=True) if is_one is kind] for kind in (True, False))
    runs = split_by_size(staged, cap_bytes, lambda param: staged_bytes(param.detach(), world_size))
    runs += split_by_size(direct, cap_bytes)
    positions = {id(param): position for position, param in enumerate(params)}
    runs.sort(key=lambda run: positions[id(run[0])])
    return [ParamBucket(run, rank, world_size, rules(run[0])) for run in runs]


def staging_bytes(buckets: Sequence[ParamBucket]) -> int:
    """The staging memory of buckets on one device."""
    sizes = [bucket.staging_bytes for bucket in buckets if bucket.packed]
    return min(STAGING_SLOTS, len(sizes)) * max(sizes, default=0)


def use_staging(buckets: Sequence[ParamBucket], transport: Callable[[Tensor], Transport]) -> None:
    """Prepare all buckets, so that `STAGING_SLOTS` in a row of those with packed parameters can be in use at once."""
    largest = max((bucket.staging_bytes for bucket in buckets), default=0)
    memory: dict[tuple[torch.device, int], Tensor] = {}
    count = 0
    for bucket in buckets:
        staging = torch.empty(0, dtype=torch.uint8, device=bucket.device)
        if bucket.packed:
            slot = (bucket.device, count % STAGING_SLOTS)
            if slot not in memory:
                memory[slot] = torch.zeros(largest, dtype=torch.uint8, device=bucket.device)
            staging, count = memory[slot], count + 1
        bucket.use(staging, transport(bucket.params[0]))
