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

    Dtype and stride order are the parameter's. As in torch, `step` is on the device for fused and capturable kernels.
    """
    on_device = group["fused"] or group["capturable"]
    moments = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
    piece = shard(param.detach(), mesh.size(), mesh.get_local_rank())
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu"),
        **{name: to_dtensor(torch.zeros_like(piece), param, mesh) for name in moments},
    }


def loaded_state(state: dict[str, Any], param: Tensor, mesh: DeviceMesh) -> dict[str, Any]:
    """`state` [d0, ...] with its full tensors cut to this rank's piece; in memory of its own, not the caller's.

    Raises:
        ValueError: an entry has another shape than the parameter.
    """
    piece = shard(param.detach(), mesh.size(), mesh.get_local_rank())
    loaded: dict[str, Any] = {}
    for key, value in state.items():
        if key == "step" or not isinstance(value, Tensor):
            loaded[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        if value.shape != param.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}, its parameter has {tuple(param.shape)}")
        mine = value.to_local() if isinstance(value, DTensor) else shard(value, mesh.size(), mesh.get_local_rank())
        loaded[key] = to_dtensor(torch.empty_like(piece).copy_(mine), param, mesh)
    return loaded


def to_dtensor(piece: Tensor, param: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's piece [c, ...] as part of a tensor of the parameter's shape [d0, ...]. No communication."""
    dim = shard_dim(param.shape, mesh.size())
    stride = torch.empty_like(param, device="meta").stride()
    placement = Replicate() if dim is None else Shard(dim)
    return DTensor.from_local(piece, mesh, [placement], run_check=False, shape=param.shape, stride=stride)
