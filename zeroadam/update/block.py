"""One block of an update, as lists of tensors: read, run torch's Adam, store.

Its gradients are cast and divided, Adam runs, and what is stored in fewer bits is rounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroadam.layout.packing import flat
from zeroadam.update.hyperparameters import MOMENTS, run_adam
from zeroadam.update.master import MASTERS, follow, join, split
from zeroadam.update.piece import Piece
from zeroadam.update.rounding import CODES, SCALES, dequantize, quantize, round_stochastically

Views = list[Tensor]


class Scratch:
    """Memory for intermediate results, the same for every block of an optimizer.

    Args:
        numel: elements of each buffer; a block with more gets buffers of its own.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self.numel, self.device = numel, device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, numel: int) -> Tensor:
        """The first `numel` elements of the buffer called `name`: [numel]."""
        if numel > self.numel:
            return torch.empty(numel, dtype=dtype, device=self.device)
        if (name, dtype) not in self._buffers:
            self._buffers[name, dtype] = torch.empty(self.numel, dtype=dtype, device=self.device)
        return self._buffers[name, dtype][:numel]

    def like(self, tensors: Sequence[Tensor], name: str, dtype: torch.dtype) -> tuple[Tensor, Views]:
        """Memory for dense tensors, one behind the other, and views of it with their shapes and strides."""
        if not tensors:
            return torch.empty(0, dtype=dtype), []
        memory = self.take(name, dtype, sum(tensor.numel() for tensor in tensors))
        views, offset = [], 0
        for tensor in tensors:
            views.append(memory.as_strided(tensor.shape, tensor.stride(), offset))
            offset += tensor.numel()
        return memory, views


@dataclass
class Run:
    """A piece, or where it is longer than a block, a run of its memory, [n] each."""

    piece: int  # its index
    part: slice | None  # of the piece's memory
    param: Tensor
    state: dict[str, Tensor]

    def grad_of(self, grads: Sequence[Tensor]) -> Tensor:
        grad = grads[self.piece]
        return grad if self.part is None else flat(grad)[self.part]


class Block:
    """Runs of one dtype that are updated together, as lists of tensors, [c, ...] or [n] each."""

    def __init__(self, pieces: Sequence[Piece], runs: Sequence[Run], amsgrad: bool, scratch: Scratch) -> None:
        self.runs, self.scratch = runs, scratch
        self.params = [run.param for run in runs]
        self.steps = [run.state["step"] for run in runs]
        self.names = MOMENTS if amsgrad else MOMENTS[:2]
        dtype, self.compute = self.params[0].dtype, pieces[runs[0].piece].compute
        self.master = next((name for name in MASTERS if name in runs[0].state), None)
        self.weights = self.params  # what Adam changes
        if self.master == "master":
            self.weights = [run.state["master"] for run in runs]
            self.rounded, self.current = (scratch.like(self.params, name, dtype) for name in ("rounded", "current"))
        elif self.master == "remainder" or dtype != self.compute:
            self.weights = scratch.like(self.params, "weight", self.compute)[1]
        # Moments that are stored in another dtype than Adam's are cast into scratch memory, 8-bit ones anew every time.
        self.moments: dict[str, Views] = {name: [] for name in MOMENTS}
        self.casts: dict[str, tuple[Views, Views]] = {}  # stored and cast moments
        self.quantized = [i for i, run in enumerate(runs) if self.names[0] + CODES in run.state]
        for name in self.names:
            stored = [run.state.get(name, run.param) for run in runs]
            self.moments[name] = stored
            if not self.quantized and stored[0].dtype != self.compute:
                self.moments[name] = scratch.like(self.params, name, self.compute)[1]
                self.casts[name] = (stored, self.moments[name])
        # Gradients that Adam cannot take as they are: those to be divided, then those only to be cast or laid out anew.
        divisors = [pieces[run.piece].divisor for run in runs]
        of_pieces = [piece.grad for piece in pieces]
        grads = [run.grad_of(of_pieces) for run in runs]
        fit = [g.dtype == self.compute and g.stride() == p.stride() for g, p in zip(grads, self.params, strict=True)]
        divided = [i for i, divisor in enumerate(divisors) if divisor > 1]
        self.copied = divided + [i for i, divisor in enumerate(divisors) if divisor == 1 and not fit[i]]
        memory, self.copies = scratch.like([self.params[i] for i in self.copied], "grad", self.compute)
        self.sums = memory[: sum(self.params[i].numel() for i in divided)]
        self.divisor = divisors[divided[0]] if divided else 1
        self.divide_on_the_way = len(self.copied) == len(divided) == 1 and fit[divided[0]]
        # Sums in float32 for Adam in fewer bits are divided before they are rounded.
        self.wide = any(grads[i].itemsize > self.compute.itemsize for i in divided)

    def use(self, grads: Sequence[Tensor]) -> None:
        """Take other gradients: one for each piece."""
        self.grads = [run.grad_of(grads) for run in self.runs]
        self.sources = [self.grads[i] for i in self.copied]
        for i, copy in zip(self.copied, self.copies, strict=True):
            self.grads[i] = copy

    def step(self, group: Mapping[str, Any]) -> None:
        self._read_weights()
        self._read_gradients()
        run_adam(self.weights, self.grads, self.moments, self.steps, group)
        self._store()

    def _read_weights(self) -> None:
        """Bring weights and moments into the dtype in which Adam runs."""
        if self.master == "master":
            follow(self.weights, self.params, self.rounded, self.current)
        elif self.master == "remainder":
            for run, weight in zip(self.runs, self.weights, strict=True):
                join(run.param, run.state["remainder"], weight.view(torch.int32))
        elif self.weights is not self.params:
            torch._foreach_copy_(self.weights, self.params)
        for stored, cast in self.casts.values():
            torch._foreach_copy_(cast, stored)
        for i in self.quantized:
            state = self.runs[i].state
            for name in self.names:
                self.moments[name][i] = dequantize(state[name + CODES], state[name + SCALES], name)

    def _read_gradients(self) -> None:
        """Copy and divide, where Adam cannot take a gradient as it is."""
        # Multiplying is faster than dividing, and the same to the bit for powers of two.
        factor = 1 / self.divisor if self.divisor & (self.divisor - 1) == 0 else None
        if self.divide_on_the_way:
            if factor is not None:
                torch.mul(self.sources[0], factor, out=self.copies[0])
            else:
                torch.div(self.sources[0], self.divisor, out=self.copies[0])
            return
        if self.wide:
            torch._foreach_copy_(self.copies, torch._foreach_div(self.sources, self.divisor))
            return
        if self.copies:
            torch._foreach_copy_(self.copies, self.sources)
        if self.divisor > 1 and factor is not None:
            self.sums.mul_(factor)
        elif self.divisor > 1:
            self.sums.div_(self.divisor)

    def _store(self) -> None:
        """Round what is stored in fewer bits than Adam computes with."""
        for i in self.quantized:
            state = self.runs[i].state
            for name in self.names:
                codes, scales = state[name + CODES], state[name + SCALES]
                new_codes, new_scales = quantize(self.moments[name][i], name, codes.numel() // scales.numel())
                codes.copy_(new_codes)
                scales.copy_(new_scales)
                self.moments[name][i] = self.params[i]  # lets go of what was dequantized
        for stored, cast in self.casts.values():
            for into, moment, step in zip(stored, cast, self.steps, strict=True):
                round_stochastically(moment, into, step, self._bits(moment))
        if self.master == "remainder":
            for run, weight in zip(self.runs, self.weights, strict=True):
                split(weight, run.param, run.state["remainder"], self._bits(weight))
        elif self.weights is not self.params:
            torch._foreach_copy_(self.params, self.weights)

    def _bits(self, like: Tensor) -> Tensor:
        """Scratch memory for an integer for each element."""
        return self.scratch.take("bits", torch.int32, like.numel()).as_strided(like.shape, like.stride())
