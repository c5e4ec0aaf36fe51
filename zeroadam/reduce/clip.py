"""Clipping by the norm of all gradients, of which each rank looks at its own pieces only."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Gradient = tuple[Tensor, Tensor, Tensor, int]  # of one parameter; see `StepPlan.gradients`


def clip_grad_norm_(
    gradients: Sequence[Gradient],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    process_group: dist.ProcessGroup,
    device: torch.device,
) -> Tensor:
    """See `ZeroAdam.clip_grad_norm_`. gradients: [d0, ...] each, of which [c, ...] is this rank's piece."""
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive or inf, not {norm_type}")
    total = _norm_of(gradients, norm_type, process_group.rank(), device)
    if math.isinf(norm_type):
        largest = torch.stack([total, total.isnan().to(total)])  # the maximum of a nan and a number may be either
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
        total = torch.where(largest[1] > 0, math.nan, largest[0])
    else:
        total = total**norm_type
        dist.all_reduce(total, group=process_group)
        total = total ** (1 / norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, set error_if_nonfinite=False"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    # What the hook has summed lives in this rank's pieces only.
    scaled = [piece if divisor > 1 else grad for _, grad, piece, divisor in gradients]
    for some in _alike(scaled):
        torch._foreach_mul_(some, factor.to(some[0]))
    return total.float()


def all_finite(gradients: Sequence[Gradient], process_group: dist.ProcessGroup, device: torch.device) -> bool:
    """See `ZeroAdam.grads_are_finite`."""
    finite = _norm_of(gradients, math.inf, process_group.rank(), device).isfinite().float()
    dist.all_reduce(finite, dist.ReduceOp.MIN, group=process_group)
    return bool(finite)


def _norm_of(gradients: Sequence[Gradient], norm_type: float, rank: int, device: torch.device) -> Tensor:
    """The norm of this rank's pieces of the mean gradients: [] float64."""
    of_divisor: dict[int, list[Tensor]] = {}
    for param, _, piece, divisor in gradients:
        if piece.numel() > 0 and (param.dim() > 0 or rank == 0):  # every rank has a 0-d one, one counts it
            of_divisor.setdefault(divisor, []).append(piece)
    norms = [torch.zeros(1, dtype=torch.float64, device=device)]
    for divisor, pieces in of_divisor.items():
        for some in _alike(pieces):
            dtype = torch.promote_types(some[0].dtype, torch.float32)
            of_pieces = torch.stack(torch._foreach_norm(some, norm_type, dtype=dtype))
            norms.append(of_pieces.to(norms[0]) / divisor)
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms), norm_type)
    return total


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors by dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())
