"""Optimizer state as DTensors of the parameter's own shape, of which this rank holds its piece.

It lives in `optimizer.state[p]` and nowhere else, under torch's own names, so that whatever saves, moves or
gathers the state of a torch optimizer does so with ours.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from zeroadam.shard import shard, shard_dim

# Device types for which torch has a fused Adam kernel.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def new_state(param: Tensor, group: dict[str, Any], mesh: DeviceMesh, master: str | None) -> dict[str, Tensor]:
    """Adam's state before the first step: `step` [] on every rank, the others [d0, ...] with [c, ...] of it here.

    Dtype and stride order are the parameter's; with a master, under that name, the moments are float32.
    """
    state = {name: new_tensor(param, name, master, mesh) for name in [*moments(group), *([master] if master else [])]}
    return {"step": new_step(param, group), **state}


def moments(group: dict[str, Any]) -> list[str]:
    """Names of the moments that Adam keeps for the parameters of a param group."""
    return ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])


def new_step(param: Tensor, group: dict[str, Any], value: float = 0.0) -> Tensor:
    """The count of steps [], where torch's Adam has it: with the parameter for fused and capturable kernels."""
    device = param.device if group["fused"] or group["capturable"] else "cpu"
    return torch.full((), value, dtype=torch.float32, device=device)


def new_tensor(param: Tensor, name: str, master: str | None, mesh: DeviceMesh) -> DTensor:
    """State [d0, ...] before the first step, of which this rank holds [c, ...]: zeros; for a master, the parameter."""
    piece = shard(param.detach(), mesh.size(), mesh.get_local_rank())
    new = torch.zeros_like(piece, dtype=state_dtype(param, name, master))
    return to_dtensor(new.copy_(piece) if name == "master" else new, param, mesh)


def state_dtype(param: Tensor, name: str, master: str | None) -> torch.dtype:
    """Of a moment: the parameter's, or float32 if it has a master, as has that; of a remainder see `master.split`."""
    return torch.float32 if master and name != "remainder" else param.dtype


def to_dtensor(piece: Tensor, param: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's piece [c, ...] as part of a tensor of the parameter's shape [d0, ...]. No communication."""
    stride = torch.empty_like(param, device="meta").stride()
    placements = placements_of(param, mesh.size())
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=param.shape, stride=stride)


def placements_of(param: Tensor, world_size: int) -> tuple[Placement, ...]:
    """How a parameter's state is cut, as DTensor says it."""
    dim = shard_dim(param.shape, world_size)
    return (Replicate() if dim is None else Shard(dim),)


def choose_kernel(group: dict[str, Any]) -> None:
    """Make fused the default of a param group where torch has a kernel for all its parameters."""
    if group["fused"] is None and group["foreach"] is None:
        group["fused"] = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in group["params"])
