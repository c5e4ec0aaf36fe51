"""The transport of a single rank, which has nothing to send, and its group."""

from collections.abc import Callable, Sequence

from torch import Tensor

from zeroadam.layout.rows import RowRules, Rows


class OneProcess:
    """In place of a process group where there is none, in a script that runs without torchrun."""

    group_name = "one process"

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class Alone:
    """See `zeroadam.transport.Transport`."""

    rules = RowRules(equal=False, direct_bytes=0)
    waits_in_forward = False
    clears_others = True
    same_on_all_ranks = True
    sums_on_device = True
    senders = 0
    channel = None

    def prepare_gather(self, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        arrived: list[Callable[[], None]] = [lambda: None] * len(exchanges)
        return lambda: arrived

    def prepare_reduce(
        self,
        exchanges: Sequence[Rows],
        scratch: Sequence[Sequence[Tensor]],  # noqa: ARG002
    ) -> Callable[[], Callable[[], list[Tensor]]]:
        sums = [rows[0] for rows in exchanges]
        return lambda: lambda: sums
