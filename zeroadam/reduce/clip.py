"""Clipping by the norm of all gradients, of which each rank looks at its own pieces only."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.reduce.join import refuse_in_join
from zeroadam.reduce.ownership import Owner
from zeroadam.transport.calls import LOOK

Gradient = tuple[Tensor, Tensor, Tensor, int]  # of one parameter; see `StepPlan.gradients`


@torch.no_grad()
def clip_grad_norm_(
    optimizers: Iterable[Owner], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over the mean gradients of all parameters of some ZeroAdams together.

    For several optimizers over one model; `ZeroAdam.clip_grad_norm_` is this for a single one. A collective of each
    process group: one all-reduce of one or two numbers. Like torch's, it scales `p.grad` in place.

    Returns:
        the norm before clipping, [] float32, the same on every rank.

    Raises:
        ValueError: no optimizers, or a `norm_type` that is not positive.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set; inside `Join`; or see `ZeroAdam.step`.
    """
    owners = list(optimizers)
    if not owners or not norm_type > 0:
        raise ValueError(f"norm_type must be positive or inf, not {norm_type}" if owners else "there are no optimizers")
    for owner in owners:
        refuse_in_join(owner, "clip_grad_norm_()")
        owner._begin(LOOK, f"clip_grad_norm_({max_norm}, {norm_type}, {error_if_nonfinite})")
    totals = [_total_norm(owner, norm_type) for owner in owners]
    together = torch.stack([total.to(totals[0].device) for total in totals])
    total = totals[0] if len(totals) == 1 else torch.linalg.vector_norm(together, norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, set error_if_nonfinite=False"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for owner in owners:
        # What the hook has summed lives in this rank's pieces only.
        scaled = [piece if divisor > 1 else grad for _, grad, piece, divisor in owner._plan.gradients]
        for some in _alike(scaled):
            torch._foreach_mul_(some, factor.to(some[0]))
        owner._plan.accept_changes()
        owner._plan.release_gradients()
    return total.float()


@torch.no_grad()
def clip_grad_value_(optimizers: Iterable[Owner], clip_value: float) -> None:
    """`torch.nn.utils.clip_grad_value_` over the mean gradients of some ZeroAdams. A collective, as ranks meet.

    Raises:
        RuntimeError: see `ZeroAdam.step`.
    """
    for owner in optimizers:
        owner._begin(LOOK, f"clip_grad_value_({clip_value})")
        for _, grad, piece, divisor in owner._plan.gradients:  # a sum over W ranks is at most W times the value
            (piece if divisor > 1 else grad).clamp_(-clip_value * divisor, clip_value * divisor)
        owner._plan.accept_changes()
        owner._plan.release_gradients()


def _total_norm(owner: Owner, norm_type: float) -> Tensor:
    """The norm of all mean gradients of an optimizer: [] float64, the same on every rank."""
    group = owner.process_group
    total = _norm_of(owner._plan.gradients, norm_type, group.rank(), owner.join_device)
    if math.isinf(norm_type):
        largest = torch.stack([total, total.isnan().to(total)])  # the maximum of a nan and a number may be either
        reduce_number(largest, dist.ReduceOp.MAX, group)
        return torch.where(largest[1] > 0, math.nan, largest[0])
    total = total**norm_type
    reduce_number(total, dist.ReduceOp.SUM, group)
    return total ** (1 / norm_type)


@torch.no_grad()
def all_finite(owner: Owner) -> bool:
    """See `ZeroAdam.grads_are_finite`."""
    refuse_in_join(owner, "grads_are_finite()")
    owner._begin(LOOK, "grads_are_finite()")
    finite = _norm_of(owner._plan.gradients, math.inf, owner.process_group.rank(), owner.join_device).isfinite().float()
    reduce_number(finite, dist.ReduceOp.MIN, owner.process_group)
    owner._plan.release_gradients()
    return bool(finite)


def reduce_number(number: Tensor, operation: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(number, operation, group=group)


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
