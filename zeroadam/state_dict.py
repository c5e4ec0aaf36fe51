"""What `state_dict()` gives away and what `load_state_dict()` takes in.

A rank's own state is 1/W of the optimizer's. Where this could be taken for the whole, there is an error; what is
loaded is looked at to the end before any of it is copied, into the memory that the state has already.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from zeroadam.agree import Manifest, check_supported, describe_hyperparameters, named
from zeroadam.collectives import gather
from zeroadam.master import MASTERS, convert
from zeroadam.precision import CODES, SCALES, Precision, convert_moment, dequantize_entry, layout
from zeroadam.shard import shard
from zeroadam.state import choose_kernel, moments, new_state, new_step, new_tensor, placements_of

if TYPE_CHECKING:
    from zeroadam.optimizer import ZeroAdam

# What a param group of a torch.optim.Adam has had from its first version on.
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


class ShardedState(dict[Any, Any]):
    """The entry "state" of a state dict, of which other ranks hold the rest: it is not for `torch.save`."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RuntimeError(
            "this is a part of the optimizer's state, the other ranks hold the rest: save with "
            "torch.distributed.checkpoint.save() on all ranks; or, for one plain file, call "
            "optimizer.consolidate_state_dict(to=0) on all ranks first, and torch.save() on rank 0. With Accelerate: "
            "accelerator.register_save_state_pre_hook(lambda *_: optimizer.optimizer.consolidate_state_dict()); with "
            "transformers' Trainer: callbacks=[zeroadam.huggingface.ConsolidateOnSave()]"
        )

    def __copy__(self) -> "ShardedState":
        return ShardedState(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedState":
        return ShardedState((key, copy.deepcopy(value, memo)) for key, value in self.items())


@dataclass
class Kept:
    """The state of a parameter on its way through torch's load_state_dict, which would cast it to the dtype of that."""

    entry: dict[str, Any]


@dataclass
class Loading:
    """A state dict that has been found fit for an optimizer, and has changed nothing yet."""

    state_dict: dict[str, Any]  # with the optimizer's own tensors for values
    copies: list[tuple[Tensor, Tensor]]  # into them
    manifest: Manifest  # what must be the same on every rank

    @torch.no_grad()
    def copy(self) -> dict[str, Any]:
        """Do it."""
        # Entries may have been exchanged: what is another's target has to be kept as it is now.
        addresses = {target.data_ptr() for target, _ in self.copies}
        for index, (target, source) in enumerate(self.copies):
            if source.data_ptr() in addresses - {target.data_ptr()}:
                self.copies[index] = (target, source.clone())
        for target, source in self.copies:
            target.copy_(source)
        return self.state_dict


def prepare_loading(optimizer: "ZeroAdam", state_dict: dict[str, Any]) -> Loading:
    """Compare a state dict, with DTensors or full tensors [d0, ...], with what the optimizer holds.

    Raises:
        ValueError: it is of other param groups, parameters, shapes, dtypes or ranks, or not Adam's.
    """
    if missing := {"state", "param_groups"} - set(state_dict):
        raise ValueError(f"this is not the state dict of an optimizer: it has no {missing.pop()!r}")
    saved_groups, own_groups = state_dict["param_groups"], optimizer.param_groups
    if len(saved_groups) != len(own_groups):
        raise ValueError(f"the state dict has {len(saved_groups)} param groups, the optimizer has {len(own_groups)}")
    loading = Loading({"state": {}, "param_groups": []}, [], {})
    known = set()
    for index, (saved, own) in enumerate(zip(saved_groups, own_groups, strict=True)):
        group = _merged_group(saved, own, index, optimizer)
        loading.state_dict["param_groups"].append({**group, "params": saved["params"]})
        loading.manifest |= describe_hyperparameters(group, index, optimizer.defaults)
        for (name, param), key in zip(named(own, index), saved["params"], strict=True):
            known.add(key)
            entry, held = state_dict["state"].get(key), optimizer.state.get(param, {})
            if not entry and not held:  # frozen
                continue
            try:
                loaded = _loaded_entry(optimizer, param, group, entry, held, loading.copies)
            except ValueError as error:
                raise ValueError(f"the state of {name} does not fit: {error}") from None
            loading.state_dict["state"][key] = Kept(loaded)
            step = float(loaded["step"])
            loading.manifest[f"the state of {name}"] = f"{'of' if entry else 'none, as before'} step {step:.0f}"
    if unknown := set(state_dict["state"]) - known:
        raise ValueError(f"the state dict has state of {sorted(map(str, unknown))[0]}, which is in none of its groups")
    return loading


def _merged_group(saved: dict[str, Any], own: dict[str, Any], index: int, optimizer: "ZeroAdam") -> dict[str, Any]:
    """A loaded param group over this optimizer's parameters; what older versions of torch do not save stays ours."""
    if len(saved["params"]) != len(own["params"]):
        raise ValueError(
            f"group {index} of the state dict has {len(saved['params'])} parameters, that of the optimizer has "
            f"{len(own['params'])}"
        )
    for key in HYPERPARAMETERS:
        if key not in saved:
            raise ValueError(f"group {index} of the state dict has no {key}: it is of another kind of optimizer")
    names, own_names = saved.get("param_names", ()), own.get("param_names", ())
    if names != own_names and sorted(names) == sorted(own_names):
        theirs, ours = next(pair for pair in zip(names, own_names, strict=True) if pair[0] != pair[1])
        raise ValueError(f"group {index} of the state dict has the parameters in another order: {theirs} for {ours}")
    defaults = {key: own[key] for key in optimizer.defaults}
    group = {**defaults, **copy.deepcopy({**saved, "params": None}), "params": own["params"]}
    choose_kernel(group)
    check_supported(group, index)
    return group


def _loaded_entry(
    optimizer: "ZeroAdam",
    param: Tensor,
    group: dict[str, Any],
    entry: dict[str, Any] | None,
    held: dict[str, Any],
    copies: list[tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """The state of one parameter after loading; what is still to be copied into it is appended to `copies`."""
    kept = optimizer.precision(param)
    loaded = dict(entry or new_state(param, group, optimizer.mesh(param), kept))  # what is in it is taken out below

    def take(*names: str) -> dict[str, Tensor]:
        return {name: _piece(name, loaded.pop(name), param, kept, optimizer) for name in names if name in loaded}

    if "step" not in loaded:
        raise ValueError("it has no step")
    sources: dict[str, Tensor] = {}
    for moment in moments(group):
        given = take(moment, moment + CODES, moment + SCALES)
        if moment not in given and len(given) < 2:
            raise ValueError(f"it has no {moment}")
        sources |= convert_moment(given, moment, param, kept)
    masters = take(*MASTERS)
    if kept.master:
        sources[kept.master] = convert(
            masters, kept.master, shard(param.detach(), optimizer.world_size, optimizer.rank)
        )
    result: dict[str, Any] = {"step": new_step(param, group, float(loaded.pop("step")))}
    sources |= take(*(name for name, value in loaded.items() if isinstance(value, Tensor)))
    for name, source in sources.items():
        wanted = layout(param, name, kept).dtype
        if source.dtype != wanted:
            because = f", and its master {wanted}" if kept.master else ""
            raise ValueError(f"{name} is {source.dtype}, the parameter is {param.dtype}{because}")
        target = held.get(name)
        if not isinstance(target, DTensor):
            target = new_tensor(param, name, kept, optimizer.mesh(param))
        result[name] = target
        copies.append((target.to_local(), source))
    return {**result, **loaded}  # what is left is somebody's own


def _piece(name: str, value: Tensor, param: Tensor, kept: Precision, optimizer: "ZeroAdam") -> Tensor:
    """This rank's piece of a loaded tensor: [d0, ...] -> [c, ...], a view."""
    whole = layout(param, name, kept)
    if value.shape != whole.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(whole.shape)} as the parameter asks for")
    if isinstance(value, DTensor) and value.placements != (Replicate(),) * value.device_mesh.ndim:
        wanted = placements_of(whole, optimizer.world_size)
        if value.placements != wanted or value.device_mesh.size() != optimizer.world_size:
            raise ValueError(
                f"{name} is cut as {value.placements} over {value.device_mesh.size()} ranks, this optimizer cuts it as "
                f"{wanted} over {optimizer.world_size}: load it with torch.distributed.checkpoint, which cuts it anew"
            )
        return value.to_local()
    full = value.to_local() if isinstance(value, DTensor) else value
    return shard(full, optimizer.world_size, optimizer.rank)


def empty_state(optimizer: "ZeroAdam") -> dict[Tensor, dict[str, Any]]:
    """Room on the CPU for the whole state: [d0, ...], in the parameter's stride order."""
    whole: dict[Tensor, dict[str, Any]] = {}
    for param, key, value in _entries(optimizer):
        if isinstance(value, DTensor):
            value = torch.empty_like(layout(param, key, optimizer.precision(param)), dtype=value.dtype, device="cpu")
        elif isinstance(value, Tensor):
            value = torch.empty_like(value, device="cpu")
        whole.setdefault(param, {})[key] = value
    return whole


def gather_state(optimizer: "ZeroAdam", whole: dict[Tensor, dict[str, Any]] | None, to: int) -> None:
    """Fill `whole` on rank `to`, where the others have None, as torch's Adam has it. A collective, tensor by tensor."""
    for param, key, value in _entries(optimizer):
        target = whole[param][key] if whole is not None else None
        if isinstance(value, DTensor) and param.dim() > 0:
            pieces = (
                [] if target is None else [shard(target, optimizer.world_size, r) for r in range(optimizer.world_size)]
            )
            gather(value.to_local(), pieces, to, optimizer.process_group)
        elif target is not None and isinstance(value, Tensor):  # which every rank has
            target.copy_(value.to_local() if isinstance(value, DTensor) else value)
    for entry in (whole or {}).values():
        dequantize_entry(entry)


def describe_state(optimizer: "ZeroAdam") -> Manifest:
    """What must be the same on every rank for the state to be gathered."""
    manifest = {}
    for index, group in enumerate(optimizer.param_groups):
        for name, param in named(group, index):
            manifest[f"the state of {name}"] = str(sorted(optimizer.state.get(param, {})))
    return manifest


def _entries(optimizer: "ZeroAdam") -> list[tuple[Tensor, str, Any]]:
    """(parameter, name, value) of all state, in the same order on every rank."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        (p, key, optimizer.state[p][key]) for p in params if p in optimizer.state for key in sorted(optimizer.state[p])
    ]
