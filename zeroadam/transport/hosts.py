"""Which ranks share a host: those that can all map each other's memory. A rank that cannot is a host of its own."""

import logging
import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam._compat import timeout_of
from zeroadam.transport import shared_memory
from zeroadam.transport.calls import Headings
from zeroadam.transport.shared_memory import SharedMemory, close

# 0 turns shared memory off; any other value is the name of a host: ranks with different ones share none.
VARIABLE = "ZEROADAM_SHARED_MEMORY"

logger = logging.getLogger(__name__)


@dataclass
class Hosts:
    """The hosts of a process group, alike on all ranks, and what this rank has open of the others on its own."""

    ranks: list[list[int]]  # of each host, in rank order; the hosts in the order of their first rank
    index: int  # of this rank's host
    place: int  # of this rank on it
    regions: list[Tensor]  # of each place; see `SharedMemory`
    pipes: dict[int, tuple[int, int]]
    timeout: float  # seconds

    def open(self, calls: Headings) -> SharedMemory:
        """The transport between the ranks of this host. Once, as the pipes are its own then."""
        return SharedMemory(self.place, self.ranks[self.index], self.regions, self.pipes, self.timeout, calls)


def find_hosts(process_group: dist.ProcessGroup) -> Hosts:
    """Who shares a host, with their memory joined. A collective; says in the log, once, if there are several.

    Neither the regions nor the pipes have a name in any file system, so nothing of them can stay behind.
    """
    rank, world_size = process_group.rank(), process_group.size()
    offered, others = _Offer(), [other for other in range(world_size) if other != rank]
    regions, writers, refusals = dict[int, Tensor](), dict[int, int](), dict[int, str]()
    kept: Collection[int] = ()
    try:
        offered.make(others)
        offers = [offered] * world_size
        dist.all_gather_object(offers, offered, group=process_group)
        for other, offer in enumerate(offers):
            try:
                regions[other] = offered.map(offer)
                if other != rank:
                    writers[other] = os.open(offer.path(offer.writers[rank]), os.O_WRONLY | os.O_CLOEXEC)
            except (OSError, RuntimeError) as error:  # the latter is what torch says
                refusals[other] = str(error)
        seen = [refusals] * world_size
        dist.all_gather_object(seen, refusals, group=process_group)
        ranks = _classes([set(range(world_size)) - set(of_one) for of_one in seen])
        index = next(index for index, some in enumerate(ranks) if rank in some)
        kept = [other for other in ranks[index] if other != rank]
        if rank == 0 and len(ranks) > 1:
            _log(ranks, seen)
    finally:
        close([*offered.writers.values(), *([offered.region] if offered.region >= 0 else [])])
        close(file for other, file in writers.items() if other not in kept)
        close(file for other, file in offered.readers.items() if other not in kept)
    place = ranks[index].index(rank)
    pipes = {ranks[index].index(other): (offered.readers[other], writers[other]) for other in kept}
    mapped = [regions[other] for other in ranks[index]] if kept else []
    return Hosts(ranks, index, place, mapped, pipes, timeout_of(process_group, "cpu"))


def _classes(seen: Sequence[set[int]]) -> list[list[int]]:
    """Ranks that see each other, each with all of its class; `seen[r]` are those whose memory rank r can map."""
    mutual = [
        {other for other in range(len(seen)) if other in seen[r] and r in seen[other]} | {r} for r in range(len(seen))
    ]
    left, classes = set(range(len(seen))), list[list[int]]()
    while left:
        joined, found = set[int](), {min(left)}
        while found:
            joined |= found
            found = set().union(*(mutual[r] for r in found)) - joined
        left -= joined
        together = [r for r in sorted(joined) if mutual[r] >= joined]
        classes += [together] if together else []
        classes += [[r] for r in sorted(joined - set(together))]
    return sorted(classes)


def _log(ranks: Sequence[Sequence[int]], seen: Sequence[Mapping[int, str]]) -> None:
    """Say why there are several hosts: the first refusal of a rank to which another has no way."""
    source, refusal = next((r, refusals[min(refusals)]) for r, refusals in enumerate(seen) if refusals)
    if len(ranks) == len(seen):
        what = "no shared memory between the ranks, so sockets are used"
    else:
        what = f"shared memory within each of {len(ranks)} hosts, {', '.join(map(str, ranks))}, sockets between them"
    logger.info("%s; rank %d says: %s", what, source, refusal)


class _Offer:
    """Open files of a process which others may open as well."""

    def __init__(self) -> None:
        self.process, self.name = os.getpid(), f"zeroadam-{secrets.token_hex(16)}"
        self.host = os.environ.get(VARIABLE, "")
        self.refusal = ""
        self.region = -1
        self.readers: dict[int, int] = {}
        self.writers: dict[int, int] = {}

    def make(self, others: Sequence[int]) -> None:
        """A region, reserved to the last byte, and a pipe from each other rank; if that cannot be, say why."""
        try:
            if self.host == "0":
                raise OSError(f"{VARIABLE}=0")
            if not hasattr(os, "memfd_create"):
                raise OSError("this system has no memfd_create")
            self.region = os.memfd_create(self.name, os.MFD_CLOEXEC)
            # Or a write to a page for which there is no memory would end the process.
            os.posix_fallocate(self.region, 0, shared_memory.SLOTS * shared_memory.SLOT_BYTES)
            for other in others:
                self.readers[other], self.writers[other] = os.pipe()
        except OSError as error:
            self.refusal = str(error)

    def path(self, file: int) -> str:
        return f"/proc/{self.process}/fd/{file}"

    def map(self, offer: "_Offer") -> Tensor:
        """The region of a rank; raises OSError if that is not on this host, or not to be seen from here."""
        if self.refusal or offer.refusal:
            raise OSError(self.refusal or offer.refusal)
        if offer.host != self.host:
            raise OSError(f"{VARIABLE}={self.host} here, {offer.host} there")
        path = offer.path(offer.region)
        if os.readlink(path) != f"/memfd:{offer.name} (deleted)":
            raise OSError(f"{path} is something else here")
        return torch.from_file(
            path, shared=True, size=shared_memory.SLOTS * shared_memory.SLOT_BYTES, dtype=torch.uint8
        )
