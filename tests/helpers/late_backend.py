"""The collectives of a backend as NCCL has them: results are there after `wait()`, and nothing can be read before."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from zeroadam.transport import backend


def late(collective: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
    """in_place: whether the inputs are parts of the outputs, and stay there."""

    def start(outputs: Sequence[Tensor], given: Sequence[Tensor], group: Any) -> SimpleNamespace:
        results, sent = [torch.empty_like(output) for output in outputs], [part.clone() for part in given]
        work = collective(results, sent, group)
        for output in outputs:
            output.fill_(float("nan"))
        if in_place:
            torch._foreach_copy_(list(given), sent)

        def wait() -> None:
            work.wait()
            torch._foreach_copy_(list(outputs), results)

        return SimpleNamespace(wait=wait)

    return start


def late_rows(collective: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
    """in_place: whether this rank's row stays readable."""

    def start(rows: Sequence[Tensor], group: Any) -> list[SimpleNamespace]:
        results = [row.clone() for row in rows]
        works = collective(results, group)
        for rank, row in enumerate(rows):
            if not in_place or rank != group.rank():
                row.fill_(float("nan"))

        def wait() -> None:
            for work in works:
                work.wait()
            torch._foreach_copy_(list(rows), results)

        return [SimpleNamespace(wait=wait)]

    return start


def late_all_to_all(collective: Callable[..., Any]) -> Callable[..., Any]:
    def start(output: Tensor, given: Tensor, received: Any, sent: Any, group: Any) -> SimpleNamespace:
        result, copied = torch.empty_like(output), given.clone()
        work = collective(result, copied, received, sent, group)
        output.fill_(float("nan"))

        def wait() -> None:
            work.wait()
            output.copy_(result)

        return SimpleNamespace(wait=wait)

    return start


def install() -> None:
    """For the process in which it is called."""
    backend.all_gather_together = late(backend.all_gather_together, in_place=True)
    backend.reduce_scatter_together = late(backend.reduce_scatter_together, in_place=False)
    backend.all_to_all = late_all_to_all(backend.all_to_all)
    backend.broadcast_rows = late_rows(backend.broadcast_rows, in_place=True)
    backend.reduce_rows = late_rows(backend.reduce_rows, in_place=False)
