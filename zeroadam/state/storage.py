"""Optimizer state as DTensors of the parameter's own shape, of which this rank holds its piece.

It lives in `optimizer.state[p]` and nowhere else, under torch's own names, so that whatever saves, moves or
gathers the state of a torch optimizer does so with ours. The user may delete it, and replace its entries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from zeroadam.layout.packing import dense_strides
from zeroadam.layout.shard import shard, shard_dim
from zeroadam.options import Options, Precision, block_numel
from zeroadam.state.agreement import named
from zeroadam.state.dtensor import is_dtensor
from zeroadam.transport.alone import OneProcess
from zeroadam.update.master import MASTERS
from zeroadam.update.rounding import CODES, SCALES, dequantize, quantize

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

# Device types for which torch has a fused Adam kernel.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class ParamState(NamedTuple):
    """The state of one parameter, as a step takes it."""

    group: int  # the index of its param group
    entry: dict[str, Any]  # `optimizer.state[p]`, or what is to become it
    local: dict[str, Tensor]  # see `Storage.local_state`
    replaced: dict[str, Tensor]  # likewise; to be put into `entry`


class Storage:
    """Makes and checks the state of parameters that are sharded over a process group.

    Args:
        device_mesh: [R, S] of hybrid sharding, of which the process group is this rank's row.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, options: Options, device_mesh: DeviceMesh | None = None
    ) -> None:
        self.process_group, self.options = process_group, options
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self.shape = (self.world_size,) if device_mesh is None else tuple(device_mesh.shape)
        self.first_replica = device_mesh is None or device_mesh.get_local_rank(0) == 0
        self.ranks = math.prod(self.shape)  # over which gradients are summed
        self._meshes = {} if device_mesh is None else {device_mesh.device_type: device_mesh}

    def mesh(self, param: Tensor) -> DeviceMesh:
        """The ranks of the process group, for DTensors on the device type of a parameter."""
        kind = param.device.type
        if kind not in self._meshes:
            self._meshes[kind] = DeviceMesh.from_group(self.process_group, kind)
        return self._meshes[kind]

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Adam's state before the first step: `step` [] on every rank, and [d0, ...] with [c, ...] of it here."""
        names = state_names(group["amsgrad"], self.options.precision(param))
        return {"step": new_step(param, group), **{name: self.new_tensor(param, name) for name in names}}

    def find_states(self, optimizer: Optimizer, params: Sequence[Tensor]) -> list[ParamState]:
        """The states of parameters, in the order of their groups; new ones where there are none. Changes nothing."""
        wanted, states, steps = set(map(id, params)), list[ParamState](), dict[int, str]()
        for index, group in enumerate(optimizer.param_groups):
            for name, param in named(group, index):
                if id(param) in wanted:
                    entry = optimizer.state.get(param) or self.new_state(param, group)
                    states.append(ParamState(index, entry, *self.local_state(param, name, group, entry)))
                    if (other := steps.setdefault(id(states[-1].local["step"]), name)) != name:
                        raise RuntimeError(
                            f"the step of {name} is the same tensor as that of {other}, so it would count twice: give "
                            "each one of its own"
                        )
        return states

    def new_tensor(self, param: Tensor, name: str) -> Tensor:
        """State before the first step, of which this rank holds its piece: zeros; for a master, the parameter."""
        whole = layout(param, name, self.options.precision(param))
        local = _empty(shard(whole, self.world_size, self.rank), param.device).zero_()
        if name == "master":
            local.copy_(shard(param.detach(), self.world_size, self.rank))
        return self.as_dtensor(local, whole, param)

    def as_dtensor(self, local: Tensor, whole: Tensor, param: Tensor) -> Tensor:
        """A piece [c, ...] as a part of a tensor with the shape and strides of `whole` [d0, ...].

        The piece itself where there is no process group, as it is the whole.
        """
        if isinstance(self.process_group, OneProcess):
            return local
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            self.mesh(param),
            self.placements(whole),
            run_check=False,
            shape=whole.shape,
            stride=dense_strides(whole),
        )

    def placements(self, whole: Tensor) -> "tuple[Placement, ...]":
        """How the state of a parameter is sharded, as DTensor says it: copied over replicas, cut over a shard group."""
        from torch.distributed.tensor import Replicate, Shard

        dim = shard_dim(whole.shape, self.world_size)
        return (Replicate(),) * (len(self.shape) - 1) + (Replicate() if dim is None else Shard(dim),)

    def check_cut(self, name: str, value: "DTensor", whole: Tensor) -> None:
        """Raise ValueError for a tensor of state that is cut otherwise than this optimizer cuts it."""
        cut, wanted = (value.placements, tuple(value.device_mesh.shape)), (self.placements(whole), self.shape)
        if cut != wanted:
            theirs, ours = (f"{how} over {' x '.join(map(str, shape))}" for how, shape in (cut, wanted))
            raise ValueError(
                f"{name} is cut as {theirs} ranks, this optimizer cuts it as {ours}: load it with "
                "torch.distributed.checkpoint, which cuts it anew"
            )

    def local_state(
        self, param: Tensor, name: str, group: Mapping[str, Any], state: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the tensors with which Adam works here, what has to be replaced in `state` for that), and changes nothing.

        The first are `step` [] and [c, ...] each. Replaced are whole tensors [d0, ...] that the user has put there, by
        this rank's piece of them, and what has other strides than the parameter has now.

        Raises:
            RuntimeError: something is missing, or does not fit the parameter; alike on all ranks.
        """
        precision, local, replaced = self.options.precision(param), dict[str, Tensor](), dict[str, Tensor]()
        expected = state_names(group["amsgrad"], precision)
        for key in ("step", *expected):
            value = state.get(key)
            if value is None and key.startswith("max_") and float(state["step"]) == 0:
                value = replaced[key] = self.new_tensor(param, key)  # as torch makes its state in the first step
            if not isinstance(value, Tensor):
                found = "missing" if value is None else f"a {type(value).__name__}"
                hint = " (amsgrad was set after the state was made)" if key.startswith("max_") else ""
                raise RuntimeError(f"{key} in the state of {name} is {found}{hint}: give it a tensor{OR_ANEW}")
            if key == "step":
                if value.numel() != 1 or is_dtensor(value) or not value.is_floating_point():
                    raise RuntimeError(
                        f"step in the state of {name} has shape {tuple(value.shape)} and dtype {value.dtype}: give it "
                        f"one floating-point number{OR_ANEW}"
                    )
                local[key] = value
                continue
            whole = layout(param, key, precision)
            if value.shape != whole.shape or value.dtype != whole.dtype or value.device != param.device:
                raise RuntimeError(
                    f"{key} in the state of {name} has shape {tuple(value.shape)} and dtype {value.dtype} on "
                    f"{value.device}, but the parameter, {param.dtype} of shape {tuple(param.shape)} on "
                    f"{param.device}, needs {tuple(whole.shape)} and {whole.dtype}. The optimizer does not follow a "
                    f"parameter that is cast or moved: build it after casting and moving the model{OR_ANEW}"
                )
            local[key], new = self._fitting(value, whole, param)
            if new is not None:
                replaced[key] = new
        stored = {key for moment in moments(amsgrad=True) for key in stored_names(moment, precision.moments)}
        others = {moment + end for moment in moments(amsgrad=True) for end in ("", CODES, SCALES)} - stored
        if precision.master:
            others |= set(MASTERS) - {precision.master}
        if unused := sorted(others & set(state)):
            raise RuntimeError(
                f"{unused[0]} in the state of {name} would not be used, as it is stored as {', '.join(expected)}: set "
                "these, or use load_state_dict(), which converts"
            )
        return local, replaced

    def _fitting(self, value: Tensor, whole: Tensor, param: Tensor) -> tuple[Tensor, Tensor | None]:
        """This rank's piece of a tensor of state, dense and in the stride order of the parameter; and what has to be
        stored for that, if not the tensor itself."""
        own = shard(whole, self.world_size, self.rank)
        piece = value.to_local() if is_dtensor(value) else shard(value, self.world_size, self.rank)
        stored = is_dtensor(value) or isinstance(self.process_group, OneProcess)
        if stored and piece.shape == own.shape and same_strides(piece, own):
            return piece, None
        if piece.shape != own.shape:
            raise RuntimeError(
                f"a state of shape {tuple(value.shape)} is sharded otherwise than this optimizer shards it: load it "
                "with torch.distributed.checkpoint"
            )
        piece = _empty(own, param.device).copy_(piece)
        return piece, self.as_dtensor(piece, whole, param)


# The end of a message about an entry of `state`.
OR_ANEW = ", or delete optimizer.state[p] for the parameter p to start anew"


def _empty(like: Tensor, device: torch.device) -> Tensor:
    """Memory without gaps for a tensor of the shape, stride order and dtype of `like`."""
    return torch.empty_strided(like.shape, dense_strides(like), dtype=like.dtype, device=device)


def same_strides(piece: Tensor, like: Tensor) -> bool:
    """Whether a piece is dense and in the stride order of `like`; dimensions of one element have any stride."""
    wanted = dense_strides(like)
    return piece.numel() == 0 or all(
        size == 1 or mine == other for size, mine, other in zip(piece.shape, piece.stride(), wanted, strict=True)
    )


def layout(param: Tensor, name: str, precision: Precision) -> Tensor:
    """A tensor without memory, of the shape [d0, ...], stride order and dtype of the state called `name`."""
    if name.endswith(SCALES) and (block := block_numel(param)):
        return torch.empty(param.shape[0], math.prod(param.shape[1:]) // block, device="meta")
    other = precision.compute if precision.moments == torch.uint8 else precision.moments
    dtype = {"master": torch.float32, "remainder": torch.bfloat16}.get(name, other)
    return torch.empty_like(param, dtype=torch.uint8 if name.endswith(CODES) else dtype, device="meta")


def state_names(amsgrad: bool, precision: Precision) -> list[str]:
    """The names of a parameter's state, without `step`."""
    names = [name for moment in moments(amsgrad) for name in stored_names(moment, precision.moments)]
    return names + ([precision.master] if precision.master else [])


def stored_names(moment: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The names under which `moment` is stored in a dtype."""
    return (moment + CODES, moment + SCALES) if dtype == torch.uint8 else (moment,)


def moments(amsgrad: bool) -> list[str]:
    """The names of Adam's moments."""
    return ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if amsgrad else [])


def new_step(param: Tensor, group: Mapping[str, Any], value: float = 0.0) -> Tensor:
    """The count of steps [], where torch's Adam has it: with the parameter for fused and capturable kernels."""
    device = param.device if group["fused"] or group["capturable"] else "cpu"
    return torch.full((), value, dtype=torch.float32, device=device)


def choose_kernel(group: dict[str, Any]) -> None:
    """Make fused the default of a param group where torch has a kernel for all its parameters."""
    if group["fused"] is None and group["foreach"] is None:
        group["fused"] = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in group["params"])


def convert_moment(given: Mapping[str, Tensor], moment: str, param: Tensor, precision: Precision) -> dict[str, Tensor]:
    """A moment as it is to be stored, [c, ...], from how it was saved; as it was if bits would be lost unasked."""
    names = stored_names(moment, precision.moments)
    if given.keys() == set(names) and (precision.moments == torch.uint8 or given[moment].dtype == precision.moments):
        return dict(given)
    value = given[moment] if moment in given else dequantize(given[moment + CODES], given[moment + SCALES], moment)
    if precision.moments == torch.uint8:
        block = block_numel(param)
        assert block is not None
        return dict(zip(names, quantize(value.float(), moment, block), strict=True))
    fits = value.is_floating_point() and value.itemsize <= 4
    return {moment: value.to(precision.moments) if fits and precision.compute == torch.float32 else value}
