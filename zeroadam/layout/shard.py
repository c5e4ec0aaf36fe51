"""How a tensor is sharded over the ranks: pure arithmetic, no communication.

A tensor is cut along one dimension into the pieces of `torch.chunk`, which are also those of DTensor's
`Shard(dim)`: ceil(size / W) each, the last ones shorter or empty. That dimension is 0, so that a piece is
one run of memory, unless this would leave some rank with clearly more than its share. Who owns what
depends on the shape and on W alone, so nothing moves when anything else about the training changes.
"""

import functools

from torch import Tensor

# Dimension 0 is cut as long as the fullest rank holds at most this times the mean. Two percent is what keeps
# GPT-2 and Llama 3 balanced to two percent for every W up to 64, and leaves most of their matrices to dimension 0.
IMBALANCE_LIMIT = 1.02


@functools.cache
def shard_dim(shape: tuple[int, ...], world_size: int) -> int | None:
    """The dimension along which a tensor of `shape` [d0, ...] is cut; None for a 0-d tensor, which every rank holds."""
    if len(shape) == 0:
        return None

    def imbalance(dim: int) -> float:
        return -(-shape[dim] // world_size) * world_size / max(shape[dim], 1)

    if imbalance(0) <= IMBALANCE_LIMIT:
        return 0
    return min(range(len(shape)), key=imbalance)


def shard_range(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """(start, length) of the piece of `rank` when a dimension of `size` is cut as `torch.chunk` does."""
    chunk = -(-size // world_size)
    start = min(rank * chunk, size)
    return start, min(chunk, size - start)


def shard_index(shape: tuple[int, ...], world_size: int, rank: int) -> tuple[slice, ...]:
    """The index of the piece of `rank`: `tensor[shard_index(tensor.shape, W, rank)]` is `shard(tensor, W, rank)`."""
    dim = shard_dim(shape, world_size)
    if dim is None:
        return ()
    start, length = shard_range(shape[dim], world_size, rank)
    return (slice(None),) * dim + (slice(start, start + length),)


def shard(tensor: Tensor, world_size: int, rank: int) -> Tensor:
    """View of the piece of `tensor` that `rank` owns: [d0, ...] -> [c, ...]; the whole of a 0-d tensor."""
    dim = shard_dim(tensor.shape, world_size)
    if dim is None:
        return tensor
    return tensor.narrow(dim, *shard_range(tensor.shape[dim], world_size, rank))
