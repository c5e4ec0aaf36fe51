"""Optimizer state as DTensors of the parameter's own shape, of which this rank holds its piece.

It lives in `optimizer.state[p]` and nowhere else, under torch's own names, so that whatever saves, moves or
gathers the state of a torch optimizer does so with ours.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from zeroadam.precision import Precision, layout, stored_names
from zeroadam.shard import shard, shard_dim

# Device types for which torch has a fused Adam kernel.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def new_state(param: Tensor, group: dict[str, Any], mesh: DeviceMesh, kept: Precision) -> dict[str, Tensor]:
    """Adam's state before the first step: `step` [] on every rank, the others [d0, ...] with [c, ...] of it here."""
    names = state_names(group["amsgrad"], kept)
    return {"step": new_step(param, group), **{name: new_tensor(param, name, kept, mesh) for name in names}}


def state_names(amsgrad: bool, kept: Precision) -> list[str]:
    """Under which names the state of a parameter is kept, but for its `step`."""
    names = [name for moment in moments({"amsgrad": amsgrad}) for name in stored_names(moment, kept.moments)]
    return names + ([kept.master] if kept.master else [])


def moments(group: dict[str, Any]) -> list[str]:
    """Names of the moments that Adam keeps for the parameters of a param group."""
    return ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])


def new_step(param: Tensor, group: dict[str, Any], value: float = 0.0) -> Tensor:
    """The count of steps [], where torch's Adam has it: with the parameter for fused and capturable kernels."""
    device = param.device if group["fused"] or group["capturable"] else "cpu"
    return torch.full((), value, dtype=torch.float32, device=device)


def new_tensor(param: Tensor, name: str, kept: Precision, mesh: DeviceMesh) -> DTensor:
    """State before the first step, of which this rank holds its piece: zeros; for a master, the parameter."""
    whole = layout(param, name, kept)
    local = torch.zeros_like(shard(whole, mesh.size(), mesh.get_local_rank()), device=param.device)
    if name == "master":
        local.copy_(shard(param.detach(), mesh.size(), mesh.get_local_rank()))
    placements = placements_of(whole, mesh.size())
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=torch.empty_like(whole).stride()
    )


def placements_of(param: Tensor, world_size: int) -> tuple[Placement, ...]:
    """How a parameter's state is cut, as DTensor says it."""
    dim = shard_dim(param.shape, world_size)
    return (Replicate() if dim is None else Shard(dim),)


def choose_kernel(group: dict[str, Any]) -> None:
    """Make fused the default of a param group where torch has a kernel for all its parameters."""
    if group["fused"] is None and group["foreach"] is None:
        group["fused"] = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in group["params"])
