"""Clipping by the norm of all gradients, of which each rank looks at its own pieces only."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.guard import accept_changes, summed_over
from zeroadam.shard import shard


def clip_grad_norm_(
    params: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    process_group: dist.ProcessGroup,
) -> Tensor:
    """See `ZeroAdam.clip_grad_norm_`. params: some parameters, any of them with a gradient [d0, ...]."""
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive or inf, not {norm_type}")
    device = params[0].device
    params = [param for param in params if param.grad is not None]
    divisors = [summed_over(param, process_group) for param in params]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for param, divisor in zip(params, divisors, strict=True):
        assert param.grad is not None
        if param.dim() == 0 and process_group.rank() > 0:  # every rank has it, one counts it
            continue
        piece = shard(param.grad, process_group.size(), process_group.rank())
        if piece.numel() == 0:
            continue
        norm = torch.linalg.vector_norm(piece, norm_type, dtype=torch.promote_types(piece.dtype, torch.float32))
        norm = norm.to(total) / divisor
        total = torch.maximum(total, norm) if math.isinf(norm_type) else total + norm**norm_type
    if math.isinf(norm_type):
        largest = torch.stack([total, total.isnan().to(total)])  # the maximum of a nan and a number may be either
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
        total = torch.where(largest[1] > 0, math.nan, largest[0])
    else:
        dist.all_reduce(total, group=process_group)
        total = total ** (1 / norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, set error_if_nonfinite=False"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for param, divisor in zip(params, divisors, strict=True):
        assert param.grad is not None
        grad = shard(param.grad, process_group.size(), process_group.rank()) if divisor > 1 else param.grad
        grad.mul_(factor.to(grad))
    accept_changes(params)
    return total.float()
