"""Memory that is used again, as new pages take longer than the sums that are made in them."""

import torch
from torch import Tensor


class Pool:
    """As many pieces as were ever in use at a time, each as large as what it was last needed for, or larger."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] or more; the caller gives it back, unless something may still write to it."""
        try:  # other threads may take as well
            memory = self.free.pop()
        except IndexError:
            memory = torch.empty(0, dtype=torch.uint8)
        return memory if memory.numel() >= nbytes else torch.empty(-(-nbytes // 64) * 64, dtype=torch.uint8)

    def give_back(self, memory: Tensor) -> None:
        self.free.append(memory)
