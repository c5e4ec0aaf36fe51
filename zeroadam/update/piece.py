"""What Adam works on: one rank's piece of one parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Piece:
    """This rank's piece of a parameter with all that its update needs, [c, ...] each."""

    param: Tensor  # dense: the parameter itself or its slot in a staging area
    grad: Tensor
    divisor: int  # the mean gradient is `grad` divided by this
    state: dict[str, Tensor]  # `step` []; scales of 8-bit moments [c, row / block]
    compute: torch.dtype  # the dtype in which Adam runs
