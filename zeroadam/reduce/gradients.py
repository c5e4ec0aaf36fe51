"""The gradients of a step: what the hook has summed of them, and lists of those that are alike."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.reduce.float_sums import FloatSum
from zeroadam.reduce.ownership import Reduced, changes, check_reduced, reduced_of


class Notes(NamedTuple):
    """What `reduce_scatter_hook` has noted about some gradients."""

    reduced: Sequence[tuple[Tensor, Tensor, Reduced]] = ()  # of one parameter of each DDP bucket: with its gradient
    sums: Mapping[int, tuple[Tensor, FloatSum]] = MappingProxyType({})  # by position: p.grad, and what is summed apart
    divisors: Sequence[int] = ()  # of each, as it is a sum over the ranks
    all_reduced: bool = False  # whether it has summed all of them


def find_notes(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    process_group: dist.ProcessGroup,
    ranks: int,
    grad_dtype: torch.dtype | None,
) -> Notes:
    """Of parameters and their gradients, [d0, ...] each, summed over `ranks`.

    Raises:
        RuntimeError: something else has changed a gradient since, or one was not summed in `grad_dtype`.
    """
    found: dict[int, tuple[Tensor, Tensor, Reduced]] = {}
    sums: dict[int, tuple[Tensor, FloatSum]] = {}
    divisors, noted = [1] * len(params), 0
    for position, (param, grad) in enumerate(zip(params, grads, strict=True) if changes() else ()):
        if (reduced := reduced_of(param)) is not None:
            check_reduced(param, grad, reduced, process_group)
            found.setdefault(id(reduced), (param, grad, reduced))
            if id(param) in reduced.sums:
                sums[position] = grad, reduced.sums[id(param)]
            divisors[position] = 1 if reduced.means or (param.dim() == 0 and position not in sums) else ranks
            noted += 1
    for position, param in enumerate(params if grad_dtype is not None else ()):
        if param.itemsize < 4 and position not in sums:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(param.shape)} was not summed in {grad_dtype}, which only "
                "a hook of this optimizer does: model.register_comm_hook(optimizer, reduce_scatter_hook) before the "
                "first backward, or build the optimizer without grad_dtype"
            )
    return Notes(list(found.values()), sums, divisors, noted == len(params))


class Alike(NamedTuple):
    """Gradients of one dtype and device that are the mean gradients after a division by `divisor`."""

    divisor: int
    known: list[Tensor]  # what this rank has of each: [c, ...] if only its piece is summed, or else [d0, ...]
    counted: list[Tensor]  # its pieces [c, ...], without those that another rank counts


class Gradients:
    """Of all parameters that have one.

    Args:
        params, grads: [d0, ...] each.
        pieces: of the gradients, this rank's, [c, ...] each.
        divisors: of each; more than 1 if only the piece is summed over the ranks.
    """

    def __init__(
        self,
        params: Sequence[Tensor] = (),
        grads: Sequence[Tensor] = (),
        pieces: Sequence[Tensor] = (),
        divisors: Sequence[int] = (),
        rank: int = 0,
    ) -> None:
        self._all, self._rank = (params, grads, pieces, divisors), rank

    @cached_property
    def alike(self) -> list[Alike]:
        """All of them; laid out at the first use, as only clipping needs it."""
        found: dict[tuple[torch.dtype, torch.device, int], Alike] = {}
        for param, grad, piece, divisor in zip(*self._all, strict=True):
            key = grad.dtype, grad.device, divisor
            if key not in found:
                found[key] = Alike(divisor, [], [])
            found[key].known.append(piece if divisor > 1 else grad)
            if piece.numel() > 0 and (param.dim() > 0 or self._rank == 0):  # every rank has a 0-d one, one counts it
                found[key].counted.append(piece)
        return list(found.values())
