"""Updating in blocks gives the numbers of updating everything at once."""

from types import SimpleNamespace
from typing import Any

import adam_reference
import master_reference
import pytest
import torch
from torch import nn

import zeroadam.update.adam
from zeroadam import ZeroAdamW
from zeroadam.update.adam import Update
from zeroadam.update.block import Scratch
from zeroadam.update.hyperparameters import refuse_capture
from zeroadam.update.piece import Piece

# Far less than a piece, and no divisor of any.
SMALL_BLOCK = 1000


def small_blocks(cls: type, options: dict[str, Any], way: str | None) -> None:
    zeroadam.update.adam.BLOCK_NUMEL = SMALL_BLOCK
    if way is None:
        adam_reference.train_both(cls, options)
    else:
        master_reference.train(cls, options, way)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("way", [None, *master_reference.WAYS])
@pytest.mark.parametrize("kernel", ["single", "foreach"])
@pytest.mark.slow
def test_blocks_do_not_change_the_numbers(run_ranks, kernel: str, way: str | None, world_size: int) -> None:
    options = {"amsgrad": True, "foreach": kernel == "foreach"}
    run_ranks(small_blocks, world_size, ZeroAdamW, options, way)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_kernel_rounds_alike_in_blocks(dtype: torch.dtype) -> None:
    """Blocks of whole vector registers: to the bit. The step is counted once, and the gradients stay."""
    found = []
    for block in (2**10, 2**30):
        zeroadam.update.adam.BLOCK_NUMEL, before = block, zeroadam.update.adam.BLOCK_NUMEL
        try:
            torch.manual_seed(0)
            numels = [5000, 3, 2**10, 1, 4096]
            params = [nn.Parameter(torch.randn(n).to(dtype)) for n in numels]
            plain = torch.optim.AdamW(params, fused=True)
            pieces = []
            for p in params:
                state = {"step": torch.tensor(4.0), "exp_avg": torch.randn(p.shape).to(dtype)}
                state["exp_avg_sq"] = torch.rand(p.shape).to(dtype)
                pieces.append(Piece(p.detach(), torch.randn(p.shape).to(dtype), 3, state, dtype))
            grads = [piece.grad.clone() for piece in pieces]
            if block == 2**10:
                Update(pieces, plain.param_groups[0], Scratch(2**12, torch.device("cpu"))).step(plain.param_groups[0])
            else:  # without room, which would be of that size
                for p, piece in zip(params, pieces, strict=True):
                    p.grad = piece.grad / 3
                    plain.state[p] = piece.state
                plain.step()
        finally:
            zeroadam.update.adam.BLOCK_NUMEL = before
        assert all(torch.equal(piece.grad, grad) for piece, grad in zip(pieces, grads, strict=True))
        assert [float(piece.state["step"]) for piece in pieces] == [5.0] * len(numels)
        found.append([(piece.param, piece.state["exp_avg"], piece.state["exp_avg_sq"]) for piece in pieces])
    for mine, theirs in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_our_own_kernel_is_only_taken_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    own = zeroadam.update.adam._triton_update.__wrapped__
    monkeypatch.delenv("ZEROADAM_TRITON", raising=False)
    assert own() is None
    kernel = SimpleNamespace()  # not imported here, as the tests of the kernel want Triton's interpreter
    monkeypatch.setattr(zeroadam.update, "adam_triton", kernel, raising=False)
    monkeypatch.setenv("ZEROADAM_TRITON", "1")
    assert own() is kernel


def test_capture_needs_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch's Adam. No GPU here: something that says that it is on one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_cuda, on_cpu = SimpleNamespace(is_cuda=True), torch.ones(1)
    refuse_capture([{"params": [on_cpu], "capturable": False}, {"params": [on_cuda], "capturable": True}])
    with pytest.raises(RuntimeError, match="capturable=True in every param group"):
        refuse_capture([{"params": [on_cuda], "capturable": True}, {"params": [on_cuda], "capturable": False}])
