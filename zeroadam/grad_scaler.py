"""Loss scaling for float16 with gradients that live on their owner only."""

from typing import Any

import torch
import torch.distributed as dist

from zeroadam.guard import accept_changes, summed_over
from zeroadam.join import refuse_in_join
from zeroadam.optimizer import ZeroAdam


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose ranks agree on whether there was an inf or nan, for use with `reduce_scatter_hook`.

    After the hook each rank sees the gradients that it owns. If one found an infinity and skipped its step while the
    others went on, they would wait for it for ever and their scales would part. Arguments and use are those of torch's;
    `unscale_` of a ZeroAdam is a collective of its process group. Other optimizers are treated as torch does.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and agree with the other ranks of the optimizer's group on infinities."""
        if not self.is_enabled() or not isinstance(optimizer, ZeroAdam):
            super().unscale_(optimizer)
            return
        refuse_in_join(optimizer, "zeroadam.GradScaler")
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param in params:
            summed_over(param, optimizer.process_group)  # raises if something else has changed the gradients
        super().unscale_(optimizer)
        found: dict[torch.device, torch.Tensor] = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for found_inf in found.values():
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=optimizer.process_group)
        accept_changes(params)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """`optimizer.step()` unless a gradient of any rank is infinite or nan, then nothing on any rank."""
        if not isinstance(optimizer, ZeroAdam):
            return super().step(optimizer, *args, **kwargs)
        supports = optimizer._step_supports_amp_scaling
        optimizer._step_supports_amp_scaling = False  # step() refuses other scalers when the hook has been used
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            optimizer._step_supports_amp_scaling = supports
