"""The gradients of a step, as lists of those that are alike."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


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
