"""Packing and unpacking are inverse, whatever is in a bucket."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroadam.gather.param_bucket import ParamBucket
from zeroadam.layout.packing import Packing, dense_strides, flat, is_dense
from zeroadam.layout.rows import RowRules, Rows
from zeroadam.layout.shard import shard

UNEQUAL, EQUAL = RowRules(equal=False, direct_bytes=2**18), RowRules(equal=True, direct_bytes=2**18)


class Nowhere:
    """A transport that the test itself stands in for."""

    waits_in_forward = False

    def prepare_gather(self, exchanges: list[Rows]) -> object:  # noqa: ARG002
        return list


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Contiguous, permuted and gapped tensors of 0 to 4 dimensions."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    gaps = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    memory = torch.randn([size * gap for size, gap in zip(shape, gaps, strict=True)])
    return memory[tuple(slice(None, None, gap) for gap in gaps)].permute(order)


@given(st.lists(tensors(), min_size=1, max_size=5), st.integers(1, 5), st.booleans(), st.sampled_from([0, 8, 2**18]))
@settings(deadline=None)
def test_every_rank_gets_what_every_other_wrote(
    params: list[torch.Tensor], world_size: int, equal: bool, direct_bytes: int
) -> None:
    """W buckets, each of which changes its own pieces; after an exchange of rows all of them hold all changes."""
    expected = [param + 1 for param in params]
    assert all(dense_strides(param) == torch.empty_like(param).stride() for param in params)
    rules = RowRules(equal, direct_bytes)
    buckets = []
    for rank in range(world_size):
        mine = [copy.deepcopy(param) for param in params]
        bucket = ParamBucket(mine, rank, world_size, rules)
        bucket.use(torch.empty(bucket.staging_bytes + 16, dtype=torch.uint8), Nowhere())  # type: ignore[arg-type]
        bucket.pack()
        for piece, param in zip(bucket.pieces, bucket.params, strict=True):
            assert is_dense(piece)
            assert torch.equal(piece, shard(param, world_size, rank))
            flat(piece).add_(1)  # as a fused kernel goes through memory
        buckets.append((mine, bucket))
    for exchange in zip(*(bucket.exchanges for _, bucket in buckets), strict=True):
        for sender, rows in enumerate(exchange):
            assert len(rows) == world_size
            assert not equal or rows.whole().numel() == world_size * rows[0].numel()
            for receiver in exchange:
                receiver[sender].copy_(rows[sender])
    for mine, bucket in buckets:
        for _, unpack in bucket.groups:
            if unpack is not None:
                unpack()
        for param, value in zip(mine, expected, strict=True):
            assert torch.equal(param, value)


@given(st.lists(tensors(), min_size=1, max_size=5), st.integers(1, 5), st.booleans(), st.booleans())
@settings(deadline=None)
def test_packed_gradients_keep_what_is_their_owners(
    grads: list[torch.Tensor], world_size: int, equal: bool, cast: bool
) -> None:
    """Row r of the staging area holds what rank r owns; a rank that gets it back has it there, and zero elsewhere."""
    for rank in range(world_size):
        mine = [grad.clone() for grad in grads if grad.numel()]
        packing = Packing(mine, world_size, rank, torch.float64 if cast else torch.float32)
        packing.use(torch.empty(packing.nbytes, dtype=torch.uint8), RowRules(equal, 0))
        packing.pack()
        packing.keep_own(packing.rows[rank].clone() if equal else packing.rows[rank])
        for grad, kept in zip([grad for grad in grads if grad.numel()], mine, strict=True):
            expected = torch.zeros_like(grad)
            shard(expected, world_size, rank).copy_(shard(grad, world_size, rank))
            assert torch.equal(kept, expected)


def test_large_pieces_are_not_packed() -> None:
    """They travel from and into the parameter itself, so that staging stays small."""
    params = [
        torch.randn(1024, 512),
        torch.randn(64, 256, 16, 16).to(memory_format=torch.channels_last),
        torch.randn(7),
    ]
    bucket = ParamBucket(params, 0, 2, UNEQUAL)
    assert [param for param, _ in bucket.direct] == params[:2]
    assert bucket.staging_bytes == 2 * 4 * 4


def test_rows_of_unequal_length_are_packed_where_the_backend_needs_equal_ones() -> None:
    params = [torch.randn(1025, 512)]
    assert ParamBucket(params, 0, 2, UNEQUAL).direct
    assert ParamBucket(params, 0, 2, EQUAL).packed
