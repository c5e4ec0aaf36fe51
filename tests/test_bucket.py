"""Packing and unpacking are inverse, whatever is in a bucket."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroadam import bucket as bucket_module
from zeroadam.bucket import Bucket, flat, is_dense
from zeroadam.shard import shard


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Contiguous, permuted and gapped tensors of 0 to 4 dimensions."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    gaps = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    memory = torch.randn([size * gap for size, gap in zip(shape, gaps, strict=True)])
    return memory[tuple(slice(None, None, gap) for gap in gaps)].permute(order)


@given(st.lists(tensors(), min_size=1, max_size=5), st.integers(1, 5), st.booleans(), st.sampled_from([8, 2**18]))
@settings(deadline=None)
def test_every_rank_gets_what_every_other_wrote(
    params: list[torch.Tensor], world_size: int, equal_rows: bool, direct_bytes: int
) -> None:
    """W buckets, each of which changes its own pieces; after an exchange of rows all of them hold all changes."""
    expected = [param + 1 for param in params]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket_module, "DIRECT_BYTES", direct_bytes)
        buckets = []
        for rank in range(world_size):
            mine = [copy.deepcopy(param) for param in params]
            buckets.append((mine, Bucket(mine, 0, rank, world_size, equal_rows=equal_rows)))
    gathers = []
    for mine, bucket in buckets:
        bucket.use_staging(torch.empty(bucket.staging_bytes + 16, dtype=torch.uint8))
        pieces = bucket.pack()
        for piece, param in zip(pieces, bucket.params, strict=True):
            assert is_dense(piece)
            assert torch.equal(piece, shard(param, world_size, bucket.rank))
            flat(piece).add_(1)  # as a fused kernel goes through memory
        gathers.append(bucket.rows())
        assert len(mine) == len(pieces)
    for gather in zip(*gathers, strict=True):
        for rank in range(world_size):
            for rows in gather:
                rows[rank].copy_(gather[rank][rank])
                assert not equal_rows or rows[rank].data_ptr() == rows[0].data_ptr() + rank * rows[0].nbytes
    for mine, bucket in buckets:
        bucket.unpack()
        for param, value in zip(mine, expected, strict=True):
            assert torch.equal(param, value)


def test_large_pieces_are_not_packed() -> None:
    """They travel from and into the parameter itself, so that staging stays small."""
    params = [
        torch.randn(1024, 512),
        torch.randn(64, 256, 16, 16).to(memory_format=torch.channels_last),
        torch.randn(7),
    ]
    bucket = Bucket(params, 0, 0, 2, equal_rows=False)
    assert bucket.direct == params[:2]
    assert bucket.staging_bytes == 2 * 4 * 4


def test_rows_of_unequal_length_are_packed_where_the_backend_needs_equal_ones() -> None:
    params = [torch.randn(1025, 512)]
    assert Bucket(params, 0, 0, 2, equal_rows=False).direct
    assert Bucket(params, 0, 0, 2, equal_rows=True).packed
