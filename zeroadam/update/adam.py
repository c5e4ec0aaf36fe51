"""The update of this rank's pieces by torch's Adam; on the CPU in blocks that stay in cache.

For each block the gradient is cast and divided, Adam runs, and what is stored in fewer bits is rounded, before the next
block is touched: all in one trip through memory, with the intermediate results in the same few megabytes of cache.
What a block does is laid out once, as lists of tensors; a step is a few calls over these lists.
On CUDA torch's fused kernel runs after the casts. With ZEROADAM_TRITON=1 a kernel of our own does all in one trip,
which no GPU has verified yet.
"""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zeroadam._compat import on_device
from zeroadam.layout.packing import flat
from zeroadam.update.block import Block, Run, Scratch
from zeroadam.update.piece import Piece
from zeroadam.update.rounding import SCALES

TRITON = "ZEROADAM_TRITON"  # 1 asks for our own kernel on CUDA
logger = logging.getLogger(__name__)

# Elements that are updated at a time on the CPU: their gradient, cast or divided, stays in cache. On other devices,
# where launching a kernel takes longer than running it on a block, all pieces of a bucket are one block.
BLOCK_NUMEL = 2**19


def scratch_numel(numels: Sequence[int], device: torch.device) -> int:
    """The elements of the largest block of updates with these numbers of elements."""
    return min(max(numels, default=0), 2 * BLOCK_NUMEL if device.type == "cpu" else 2**62)


class Update:
    """One step of Adam on some pieces of one param group and device, in place on their parameters and states.

    Gradients stay as they are, as another backward may add to them.
    """

    def __init__(self, pieces: Sequence[Piece], group: Mapping[str, Any], scratch: Scratch) -> None:
        # Those of other ranks, of which only the steps are counted here.
        self.empty_steps = [piece.state["step"] for piece in pieces if piece.param.numel() == 0]
        self.indices = [index for index, piece in enumerate(pieces) if piece.param.numel() > 0]
        own = [pieces[index] for index in self.indices]
        self.amsgrad = bool(group["amsgrad"])
        self.step_copies: tuple[list[Tensor], list[Tensor]] = ([], [])  # copies, and what they are copies of
        self.device = pieces[0].param.device
        self.kernel: Any = _kernel_for(self.device)
        self.launches: Any = None  # of the kernel in the step that has been prepared
        self.for_kernel = {
            index: piece
            for index, piece in enumerate(own)
            if self.kernel is not None and self.kernel.fits(piece, group)
        }
        self.blocks = [Block(own, runs, self.amsgrad, scratch) for runs in self._blocks(own)]
        self.use([piece.grad for piece in pieces])

    def use(self, grads: Sequence[Tensor]) -> None:
        """Take other gradients, which must have the dtypes and strides of those before: one for each piece."""
        own = [grads[index] for index in self.indices]
        for index, piece in self.for_kernel.items():
            piece.grad = own[index]
        for block in self.blocks:
            block.use(own)

    def release(self) -> None:
        """Let go of the gradients, until `use` brings others."""
        for piece in self.for_kernel.values():
            piece.grad = torch.empty(0)
        for block in self.blocks:
            block.grads = block.sources = []

    def step(self, group: Mapping[str, Any]) -> None:
        """Update everything, by the values that `group` has now."""
        if self.kernel is not None:
            if self.launches is None:
                prepare([[(0, self)]], [group])
            with on_device(self.device):  # where Triton launches
                for launch in self.launches:
                    self.kernel.update(launch, group)
            self.launches = None
        elif self.empty_steps:
            torch._foreach_add_(self.empty_steps, 1)
        if self.step_copies[0]:
            torch._foreach_copy_(*self.step_copies)
        for block in self.blocks:
            block.step(group)

    def _blocks(self, pieces: Sequence[Piece]) -> list[list[Run]]:
        blocks: list[list[Run]] = []
        numel = BLOCK_NUMEL
        for index, piece in enumerate(pieces):
            for run in self._runs(index, piece) if index not in self.for_kernel else ():
                if numel >= BLOCK_NUMEL and (piece.param.device.type == "cpu" or not blocks):
                    blocks.append([])
                    numel = 0
                blocks[-1].append(run)
                numel += run.param.numel()
        return blocks

    def _runs(self, index: int, piece: Piece) -> list[Run]:
        numel = piece.param.numel()
        state = {name: tensor for name, tensor in piece.state.items() if name != "step"}
        strides = {t.stride() for name, t in state.items() if not name.endswith(SCALES)} | {piece.grad.stride()}
        small = piece.param.device.type != "cpu" or numel <= BLOCK_NUMEL
        if small or strides != {piece.param.stride()}:
            return [Run(index, None, piece.param, piece.state)]
        runs, memory = [], {name: flat(tensor) for name, tensor in state.items()}
        for start in range(0, numel, BLOCK_NUMEL):
            part = slice(start, start + BLOCK_NUMEL)
            step = piece.state["step"]
            if start:  # Adam counts a step for every run, so each has a count of its own
                step = torch.empty_like(step)
                self.step_copies[0].append(step)
                self.step_copies[1].append(piece.state["step"])
            of_run = {"step": step}
            for name, tensor in memory.items():
                per_number = numel // tensor.numel()  # elements of the piece for each number: 1, or a block's
                of_run[name] = tensor[start // per_number : (start + BLOCK_NUMEL) // per_number]
            runs.append(Run(index, part, flat(piece.param)[part], of_run))
        return runs


def prepare(updates: Sequence[Sequence[tuple[int, Update]]], groups: Sequence[Mapping[str, Any]]) -> None:
    """What our own kernel needs is computed here for all updates of a step at once, not for each of them.

    updates: those of each bucket, each with the index of its param group.
    """
    together: dict[tuple[int, torch.device], list[Update]] = {}
    for index, update in chain.from_iterable(updates):
        if update.kernel is not None:
            together.setdefault((index, update.device), []).append(update)
    for (index, _), some in together.items():
        steps = [step for update in some for step in update.empty_steps]
        launches = some[0].kernel.prepare([list(update.for_kernel.values()) for update in some], groups[index], steps)
        for update, of_update in zip(some, launches, strict=True):
            update.launches = of_update


def _kernel_for(device: torch.device) -> Any:
    return _triton_update() if device.type == "cuda" else None


@functools.cache
def _triton_update() -> Any:
    """The module of our own CUDA kernel, if it is asked for. Imported late, as importing Triton takes long."""
    if os.environ.get(TRITON) != "1":
        return None
    from zeroadam.update import adam_triton

    logger.info("%s=1: parameters on CUDA are updated by zeroadam's own Triton kernel", TRITON)
    return adam_triton
