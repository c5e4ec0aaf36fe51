"""Loss scaling for float16 with gradients that live on their owner only."""

from typing import Any

import torch
import torch.distributed as dist

from zeroadam.reduce.clip import begin, end, reduce_number
from zeroadam.reduce.ownership import Owner


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose ranks agree on whether there was an inf or nan, for use with `reduce_scatter_hook`.

    After the hook each rank sees the gradients that it owns. If one found an infinity and skipped its step while the
    others went on, they would wait for it for ever and their scales would part. Arguments and use are those of torch's;
    `unscale_` of a ZeroAdam is a collective of its process group. Other optimizers are treated as torch does.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and agree with the other ranks of the optimizer's group on infinities."""
        if not self.is_enabled() or not isinstance(optimizer, Owner):
            super().unscale_(optimizer)
            return
        begin(optimizer, "GradScaler.unscale_")  # raises if something else has changed the gradients
        super().unscale_(optimizer)
        found: dict[torch.device, torch.Tensor] = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        sums = [one.total for _, one in optimizer._plan.notes.sums.values()]
        for device, found_inf in found.items():
            if some := [total for total in sums if total.device == device]:
                inverse = self.scale(torch.ones((), dtype=torch.float64, device=device)).reciprocal().float()
                torch._amp_foreach_non_finite_check_and_unscale_(some, found_inf, inverse)
            reduce_number(found_inf, dist.ReduceOp.MAX, optimizer.process_group)
        end(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """`optimizer.step()` unless a gradient of any rank is infinite or nan, then nothing on any rank."""
        if not isinstance(optimizer, Owner):
            return super().step(optimizer, *args, **kwargs)
        supports = optimizer._step_supports_amp_scaling
        optimizer._step_supports_amp_scaling = False  # step() refuses other scalers when the hook has been used
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            optimizer._step_supports_amp_scaling = supports


def refuse_torch_scaler(optimizer: Any) -> None:
    """Raise RuntimeError if torch.amp.GradScaler has left unscaling to `optimizer.step()`, as it may with a hook."""
    if hasattr(optimizer, "found_inf"):
        del optimizer.found_inf, optimizer.grad_scale
        raise RuntimeError(
            "torch.amp.GradScaler sees the infinities of this rank's gradients only, once reduce_scatter_hook has "
            "summed them: use zeroadam.GradScaler"
        )
