"""What `state_dict()` gives and what `load_state_dict()` takes.

What is loaded is checked to the end before any of it is copied, into the memory that the state has already.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zeroadam.layout.shard import shard
from zeroadam.options import Precision
from zeroadam.state.agreement import Manifest, check_hyperparameters, check_supported, describe_hyperparameters, named
from zeroadam.state.dtensor import is_dtensor
from zeroadam.state.part import ShardedState
from zeroadam.state.storage import Storage, choose_kernel, convert_moment, layout, moments, new_step
from zeroadam.transport.gloo import gather_to
from zeroadam.update.master import MASTERS, convert
from zeroadam.update.rounding import CODES, SCALES, dequantize_entry

# What a param group of a torch.optim.Adam has had from its first version on.
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def has_numbers(state: Mapping[Any, Any]) -> bool:
    """Whether somebody has put something into a state before the first step."""
    entries = [entry for entry in state.values() if isinstance(entry, dict)]
    values = [value for entry in entries for key, value in entry.items() if key not in MASTERS]
    return any(bool(local_of(value).any()) for value in values if isinstance(value, Tensor))


def without_the_untrained(state: Mapping[Any, Any], groups: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    """Without what torch's Adam has no state of: parameters that left their groups before they were trained."""
    held = {id(param) for group in groups for param in group["params"]}
    return {
        key: entry
        for key, entry in state.items()
        if not isinstance(key, Tensor) or id(key) in held or not entry or float(entry.get("step", 1)) > 0
    }


def as_part(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict of one of W ranks, which is not for `torch.save`."""
    return {**state_dict, "state": ShardedState(state_dict["state"])}


def as_plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict of a single rank, or one that was consolidated."""
    return {**state_dict, "state": {key: _plain(value) for key, value in state_dict["state"].items()}}


def _plain(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {key: local_of(value) for key, value in entry.items()}


def local_of(value: Any) -> Any:
    return value.to_local() if is_dtensor(value) else value


@dataclass
class Loaded:
    """A parameter's state on its way through torch's load_state_dict, which would cast it to the parameter's dtype."""

    entry: dict[str, Any]


@dataclass
class Loading:
    """A state dict that has been checked against an optimizer, and has changed nothing yet."""

    state_dict: dict[str, Any]  # with the optimizer's own tensors for values
    copies: list[tuple[Tensor, Tensor]]  # into them
    manifest: Manifest  # what must be the same on every rank

    @torch.no_grad()
    def copy(self) -> dict[str, Any]:
        """Copy everything into the optimizer's own tensors; returns the dict of these."""
        # Entries may have been exchanged: what is another's target has to be kept as it is now.
        addresses = {target.data_ptr() for target, _ in self.copies}
        for index, (target, source) in enumerate(self.copies):
            if source.data_ptr() in addresses - {target.data_ptr()}:
                self.copies[index] = (target, source.clone())
        for target, source in self.copies:
            target.copy_(source)
        return self.state_dict


def prepare_loading(optimizer: Optimizer, storage: Storage, state_dict: dict[str, Any]) -> Loading:
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
    known, without = set(), list[str]()
    for index, (saved, own) in enumerate(zip(saved_groups, own_groups, strict=True)):
        group = _merged_group(saved, own, index, optimizer)
        loading.state_dict["param_groups"].append({**group, "params": saved["params"]})
        loading.manifest |= describe_hyperparameters(group, index, optimizer.defaults)
        for (name, param), key in zip(named(own, index), saved["params"], strict=True):
            known.add(key)
            entry, held = state_dict["state"].get(key), optimizer.state.get(param, {})
            if not entry and not held:  # frozen
                continue
            if not entry and state_dict["state"] and param.requires_grad:
                without.append(name)
            try:
                loaded = _loaded_entry(storage, param, group, entry, held, loading.copies)
            except ValueError as error:
                raise ValueError(f"the state of {name} does not fit: {error}") from None
            loading.state_dict["state"][key] = Loaded(loaded)
            step = float(loaded["step"])
            loading.manifest[f"the state of {name}"] = f"{'of' if entry else 'none, as before'} step {step:.0f}"
    for key, value in state_dict["state"].items():
        if key in known:
            continue
        if isinstance(value, dict) and type(key) in set(map(type, known)):
            raise ValueError(f"the state dict has state of {key}, which is in none of its groups")
        loading.state_dict["state"][key] = value  # somebody's own, which torch keeps as well
    if without and storage.rank == 0:
        more = f" and of {len(without) - 1} more" if without[1:] else ""
        warnings.warn(f"the state dict has no state of {without[0]}{more}: they begin anew", stacklevel=2)
    return loading


def _merged_group(saved: dict[str, Any], own: dict[str, Any], index: int, optimizer: Optimizer) -> dict[str, Any]:
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
    defaults = {key: own.get(key, value) for key, value in optimizer.defaults.items()}
    group = {**defaults, **copy.deepcopy({**saved, "params": None}), "params": own["params"]}
    check_hyperparameters(group, f"group {index} of the state dict")
    choose_kernel(group)
    check_supported(group, index)
    return group


def _loaded_entry(
    storage: Storage,
    param: Tensor,
    group: dict[str, Any],
    entry: dict[str, Any] | None,
    held: dict[str, Any],
    copies: list[tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """The state of one parameter after loading; what is still to be copied into it is appended to `copies`."""
    if entry is not None and not isinstance(entry, Mapping):
        raise ValueError(f"it is a {type(entry).__name__}, not a dict")
    precision = storage.options.precision(param)
    loaded = dict(entry or storage.new_state(param, group))  # what is in it is taken out below

    def take(*names: str) -> dict[str, Tensor]:
        return {name: _piece(name, loaded.pop(name), param, precision, storage) for name in names if name in loaded}

    if "step" not in loaded:
        raise ValueError("it has no step")
    sources: dict[str, Tensor] = {}
    for moment in moments(group["amsgrad"]):
        given = take(moment, moment + CODES, moment + SCALES)
        if moment not in given and len(given) < 2:
            raise ValueError(f"it has no {moment}")
        sources |= convert_moment(given, moment, param, precision)
    masters = take(*MASTERS)
    if precision.master:
        own = shard(param.detach(), storage.world_size, storage.rank)
        sources[precision.master] = convert(masters, precision.master, own)
    result: dict[str, Any] = {"step": new_step(param, group, _count(loaded.pop("step")))}
    sources |= take(*(name for name, value in loaded.items() if isinstance(value, Tensor)))
    for name, source in sources.items():
        wanted = layout(param, name, precision).dtype
        if source.dtype != wanted:
            because = f", and its master {wanted}" if precision.master else ""
            raise ValueError(f"{name} is {source.dtype}, the parameter is {param.dtype}{because}")
        target = held.get(name)
        if not is_dtensor(target):
            target = storage.new_tensor(param, name)
        result[name] = target
        copies.append((local_of(target), source))
    return {**result, **loaded}  # what is left is somebody's own


def _count(step: Any) -> float:
    """The number of steps in a state dict: a number, or a tensor of one."""
    if isinstance(step, Tensor) and (step.numel() != 1 or step.is_meta):
        raise ValueError(f"step has shape {tuple(step.shape)} on {step.device}: it must be one number")
    if not isinstance(step, (Tensor, float, int)):
        raise ValueError(f"step is a {type(step).__name__}, not a number")
    count = float(step)
    if not (count >= 0 and count.is_integer()):
        raise ValueError(f"step is {count}, not how many steps there were")
    return count


def _piece(name: str, value: Tensor, param: Tensor, precision: Precision, storage: Storage) -> Tensor:
    """This rank's piece of a loaded tensor: [d0, ...] -> [c, ...], a view."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
    if value.is_meta or value.layout != torch.strided:
        raise ValueError(f"{name} has no values (it is on the meta device)" if value.is_meta else f"{name} is sparse")
    whole = layout(param, name, precision)
    if value.shape != whole.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(whole.shape)} as the parameter asks for")
    if is_dtensor(value) and not all(placement.is_replicate() for placement in value.placements):
        storage.check_cut(name, value, whole)
        return value.to_local()
    return shard(local_of(value), storage.world_size, storage.rank)


def empty_state(optimizer: Optimizer, storage: Storage) -> dict[Any, Any]:
    """Memory on the CPU for the whole state: [d0, ...], in the parameter's stride order."""
    whole: dict[Any, Any] = {}
    for param, key, value in _entries(optimizer):
        if is_dtensor(value):
            like = layout(param, key, storage.options.precision(param))
            value = torch.empty_like(like, dtype=value.dtype, device="cpu")
        elif isinstance(value, Tensor):
            value = torch.empty_like(value, device="cpu")
        whole.setdefault(param, {})[key] = value
    return whole | {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}


def gather_state(optimizer: Optimizer, storage: Storage, whole: dict[Any, Any] | None, to: int) -> None:
    """Fill `whole` on rank `to`, where the others have None, as torch's Adam has it. A collective, tensor by tensor."""
    for param, key, value in _entries(optimizer):
        target = whole[param][key] if whole is not None else None
        if is_dtensor(value) and param.dim() > 0:
            ranks = range(storage.world_size)
            pieces = [] if target is None else [shard(target, storage.world_size, rank) for rank in ranks]
            gather_to(value.to_local(), pieces, to, storage.process_group)
        elif target is not None and isinstance(value, Tensor):  # which every rank has
            target.copy_(local_of(value))
    for entry in (
        [] if whole is None else [whole[param] for param in {param: None for param, _, _ in _entries(optimizer)}]
    ):
        dequantize_entry(entry)


def describe_state(optimizer: Optimizer) -> Manifest:
    """What must be the same on every rank for the state to be gathered."""
    manifest = {}
    for index, group in enumerate(optimizer.param_groups):
        for name, param in named(group, index):
            state = optimizer.state.get(param, {})
            step = f" of step {float(state['step']):.0f}" if "step" in state else ""
            manifest[f"the state of {name}"] = f"{sorted(state)}{step}"
    return manifest


def _entries(optimizer: Optimizer) -> list[tuple[Tensor, str, Any]]:
    """(parameter, name, value) of all state, in the same order on every rank."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        (p, key, optimizer.state[p][key]) for p in params if p in optimizer.state for key in sorted(optimizer.state[p])
    ]
