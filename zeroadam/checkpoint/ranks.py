"""The ranks that save and load together, in a process group apart from what the training sends meanwhile."""

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from zeroadam.state.agreement import Manifest, check_ranks_agree, joined_group
from zeroadam.transport.alone import OneProcess

# How long a rank may write while others wait for it. One that ends is noticed at once.
TIMEOUT = timedelta(hours=2)
# How long a rank waits for the others to make the same call.
PATIENCE = timedelta(minutes=30)


class Ranks:
    """All ranks, over gloo. A collective to make; without torchrun there is one."""

    def __init__(self) -> None:
        everyone = joined_group(None)
        self.rank, self.world_size, self.closed = everyone.rank(), everyone.size(), False
        self.group: dist.ProcessGroup = everyone
        self.process_group: dist.ProcessGroup | None = None  # None where there is none
        if isinstance(everyone, OneProcess):
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        else:
            self.group = self.process_group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def agree(self, describe: Callable[[], Manifest]) -> None:
        """`zeroadam.state.agreement.check_ranks_agree`; raises as well where not all ranks come to it in time."""
        if self.closed:
            raise RuntimeError("this Manager is closed: make another one")
        if self.world_size > 1:
            try:
                dist.monitored_barrier(self.group, PATIENCE, wait_all_ranks=True)
            except RuntimeError as error:
                raise RuntimeError(f"all ranks have to call what a Manager does, and not all have: {error}") from None
        check_ranks_agree(self.group, describe)

    def gathered(self, value: Any) -> list[Any]:
        """That of each rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def close(self) -> None:
        self.closed = True
        if self.process_group is not None:
            # A thread of gloo may still need the interpreter's lock to free tensors, while the group waits for its
            # threads (pytorch#56297); and one that is left when the interpreter ends aborts the process.
            time.sleep(0.1)
            dist.destroy_process_group(self.process_group)
            self.process_group = None
