"""Optimizer state as DTensors of the parameter's own shape, of which this rank holds its piece.

It lives in `optimizer.state[p]` and nowhere else, under torch's own names, so that whatever saves, moves or
gathers the state of a torch optimizer does so with ours.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from zeroadam.shard import shard, shard_dim


def new_state(param: Tensor, group: dict[str, Any], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Adam's state before the first step: `step` [] on every rank, the moments [d0, ...] with [c, ...] of it here.

    Dtype and stride order are the parameter's.
    """
    moments = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
    piece = shard(param.detach(), mesh.size(), mesh.get_local_rank())
    return {
        "step": torch.zeros((), dtype=torch.float32, device=_step_device(param, group)),
        **{name: to_dtensor(torch.zeros_like(piece), param, mesh) for name in moments},
    }


def loaded_state(state: dict[str, Any], param: Tensor, group: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """`state` [d0, ...] with its full tensors cut to this rank's piece; in memory of its own, not the caller's.

    Raises:
        ValueError: an entry has another shape than the parameter, or was cut over other ranks.
    """
    piece = shard(param.detach(), mesh.size(), mesh.get_local_rank())
    loaded: dict[str, Any] = {}
    for key, value in state.items():
        if key == "step":
            loaded[key] = value.clone().to(_step_device(param, group))
            continue
        if not isinstance(value, Tensor):
            loaded[key] = value
            continue
        if value.shape != param.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}, its parameter has {tuple(param.shape)}")
        mine = value.to_local() if isinstance(value, DTensor) else shard(value, mesh.size(), mesh.get_local_rank())
        if mine.shape != piece.shape:
            raise ValueError(
                f"{key} holds {tuple(mine.shape)} on this rank, which owns {tuple(piece.shape)} of it: it is the state "
                "of another number of ranks; load it with torch.distributed.checkpoint, which cuts it anew"
            )
        loaded[key] = to_dtensor(torch.empty_like(piece).copy_(mine), param, mesh)
    return loaded


def _step_device(param: Tensor, group: dict[str, Any]) -> torch.device | str:
    """Where torch's Adam has the step count: with the parameter for fused and capturable kernels, else on the CPU."""
    return param.device if group["fused"] or group["capturable"] else "cpu"


def to_dtensor(piece: Tensor, param: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's piece [c, ...] as part of a tensor of the parameter's shape [d0, ...]. No communication."""
    dim = shard_dim(param.shape, mesh.size())
    stride = torch.empty_like(param, device="meta").stride()
    placement = Replicate() if dim is None else Shard(dim)
    return DTensor.from_local(piece, mesh, [placement], run_check=False, shape=param.shape, stride=stride)
