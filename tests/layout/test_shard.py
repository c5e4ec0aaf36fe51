"""Shards are disjoint, cover the tensor, are DTensor's, and leave no rank with much more than its share."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from zeroadam.layout.shard import shard, shard_dim, shard_range

shapes = st.lists(st.integers(0, 12), max_size=4).map(tuple)
world_sizes = st.integers(1, 64)


@given(shapes, world_sizes)
def test_pieces_are_disjoint_and_cover_the_tensor(shape: tuple[int, ...], world_size: int) -> None:
    owners = torch.zeros(shape)
    for rank in range(world_size):
        shard(owners, world_size, rank).add_(1)
    assert torch.equal(owners, torch.full(shape, 1.0 if shape else world_size))


@given(shapes, world_sizes)
def test_pieces_are_those_of_torch_chunk(shape: tuple[int, ...], world_size: int) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    dim = shard_dim(shape, world_size)
    chunks = tensor.chunk(world_size, dim) if dim is not None else [tensor] * world_size
    for rank in range(world_size):
        piece = shard(tensor, world_size, rank)
        if rank < len(chunks):
            assert torch.equal(piece, chunks[rank])
        else:  # torch.chunk leaves empty chunks out
            assert piece.numel() == 0


@given(st.integers(0, 10**6), world_sizes, st.data())
def test_ranges_are_those_of_dtensor(size: int, world_size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    length, start = Shard.local_shard_size_and_offset(size, world_size, rank)
    assert shard_range(size, world_size, rank) == (start, length)


def distribute(dtensor_shapes: list[tuple[int, ...]]) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for shape in dtensor_shapes:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        dim = shard_dim(shape, mesh.size())
        local = distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim)]).to_local()
        assert torch.equal(local, shard(tensor, mesh.size(), mesh.get_local_rank())), shape


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_pieces_are_what_dtensor_distributes(run_ranks, world_size: int) -> None:
    assert DTensor is not None
    run_ranks(distribute, world_size, [(), (1,), (7,), (3, 8), (2, 3, 5), (0, 4), (16, 2), (12, 12)])


def gpt2_124m() -> Iterator[tuple[int, ...]]:
    yield from [(50257, 768), (1024, 768), (768,), (768,)]
    for _ in range(12):
        yield from [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
        yield from [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]


def llama(
    vocabulary: int, width: int, key_width: int, hidden: int, layers: int, *, tied: bool
) -> Iterator[tuple[int, ...]]:
    yield from [(vocabulary, width), (width,)] + ([] if tied else [(vocabulary, width)])
    for _ in range(layers):
        yield from [(width, width), (key_width, width), (key_width, width), (width, width), (width,), (width,)]
        yield from [(hidden, width), (hidden, width), (width, hidden)]


MODELS = {
    "GPT-2 124M": (124_439_808, list(gpt2_124m())),
    "Llama-3.2-1B": (1_235_814_400, list(llama(128256, 2048, 512, 8192, 16, tied=True))),
    "Llama-3-8B": (8_030_261_248, list(llama(128256, 4096, 1024, 14336, 32, tied=False))),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_the_fullest_rank_holds_at_most_two_percent_more_than_the_mean(name: str) -> None:
    numel, model = MODELS[name]
    assert sum(math.prod(shape) for shape in model) == numel
    tensors = [torch.empty(shape, device="meta") for shape in model]
    for world_size in range(2, 65):
        held = [sum(shard(t, world_size, rank).numel() for t in tensors) for rank in range(world_size)]
        assert sum(held) == numel
        assert max(held) <= 1.02 * numel / world_size, world_size


def test_dimension_0_is_cut_unless_another_is_clearly_more_equal() -> None:
    assert shard_dim((50257, 768), 64) == 0
    assert shard_dim((2, 4096), 4) == 1
    assert shard_dim((3, 3), 2) == 0
    assert shard_dim((768, 3072), 63) == 1
    assert shard_dim((), 4) is None
