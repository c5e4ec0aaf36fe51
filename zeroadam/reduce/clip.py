"""Clipping by the norm of all gradients, of which each rank looks at its own pieces only."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zeroadam.reduce.gradients import Gradients
from zeroadam.reduce.join import refuse_in_join
from zeroadam.reduce.ownership import Owner
from zeroadam.transport.calls import LOOK


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
    if not owners:
        raise ValueError("there are no optimizers")
    for owner in owners:
        begin(owner, "clip_grad_norm_", max_norm=max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite)
    totals = [_total_norm(owner, norm_type) for owner in owners]
    total = totals[0]
    if len(totals) > 1:
        total = torch.linalg.vector_norm(torch.stack([some.to(total.device) for some in totals]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        for owner in owners:
            owner._plan.release_gradients()
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, set error_if_nonfinite=False"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for owner in owners:
        for alike in owner._plan.gradients.alike:
            torch._foreach_mul_(alike.known, factor.to(alike.known[0]))
        end(owner)
    return total.float()


@torch.no_grad()
def clip_grad_value_(optimizers: Iterable[Owner], clip_value: float) -> None:
    """`torch.nn.utils.clip_grad_value_` over the mean gradients of some ZeroAdams. A collective, as ranks meet.

    Raises:
        RuntimeError: see `ZeroAdam.step`.
    """
    for owner in optimizers:
        begin(owner, "clip_grad_value_", clip_value=clip_value)
        for alike in owner._plan.gradients.alike:
            most = float(clip_value) * alike.divisor  # for the sum over the ranks
            torch._foreach_clamp_min_(alike.known, -most)
            torch._foreach_clamp_max_(alike.known, most)
        end(owner)


def begin(owner: Owner, call: str, **arguments: float) -> None:
    """Meet the other ranks of an optimizer in a call between backward and step. Raises as `ZeroAdam.step`."""

    def describe() -> str:
        if not arguments.get("norm_type", 1.0) > 0:
            raise ValueError(f"norm_type must be positive or inf, not {arguments['norm_type']}")
        return f"{call}({', '.join(f'{name}={float(value)!r}' for name, value in arguments.items())})"

    refuse_in_join(owner, f"{call}()")
    owner._begin(LOOK, describe)


def end(owner: Owner) -> None:
    """Go on with the gradients as this call has left them on all ranks."""
    owner._plan.accept_changes()
    owner._plan.release_gradients()


def _total_norm(owner: Owner, norm_type: float) -> Tensor:
    """The norm of all mean gradients of an optimizer: [] float64, the same on every rank."""
    group = owner.process_group
    total = _norm_of(owner._plan.gradients, norm_type, owner.join_device)
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
    begin(owner, "grads_are_finite")
    finite = _norm_of(owner._plan.gradients, math.inf, owner.join_device).isfinite().float()
    reduce_number(finite, dist.ReduceOp.MIN, owner.process_group)
    owner._plan.release_gradients()
    return bool(finite)


def reduce_number(number: Tensor, operation: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(number, operation, group=group)


def _norm_of(gradients: Gradients, norm_type: float, device: torch.device) -> Tensor:
    """The norm of this rank's pieces of the mean gradients: [] float64."""
    norms = []
    for divisor, _, pieces in gradients.alike:
        if pieces:
            dtype = torch.promote_types(pieces[0].dtype, torch.float32)
            of_pieces = torch.stack(torch._foreach_norm(pieces, norm_type, dtype=dtype))
            norms.append(torch.linalg.vector_norm(of_pieces, norm_type, dtype=torch.float64).to(device) / divisor)
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    total: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total
