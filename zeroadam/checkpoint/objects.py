"""What a checkpoint holds: models, optimizers of their parameters, and whatever else has a state."""

import io
import warnings
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zeroadam._compat import set_element
from zeroadam.untrusted import UnsafeError, load_object

RANDOM = "random_state"


class Objects:
    """The objects of a training, as one state dict; see `zeroadam.checkpoint.Manager`.

    Args:
        objects: by name; those that have the same state on all ranks.
        per_rank: by name; those that have another on each.

    Raises:
        ValueError: one has no state_dict; an optimizer holds parameters of none of the models.
    """

    def __init__(self, rank: int, objects: Mapping[str, Any], per_rank: Mapping[str, Any]) -> None:
        self.mine = f"rank {rank}"
        self.objects = {name: obj for name, obj in objects.items() if obj is not None}
        self.per_rank = dict(per_rank)
        self.of_rank = [*self.per_rank, RANDOM]  # what each rank has of its own
        for name, obj in {**self.objects, **self.per_rank}.items():
            if not (hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")):
                raise ValueError(f"{name} is a {_kind(obj)}, without state_dict() and load_state_dict()")
            if "." in name or name == RANDOM or (name in self.objects and name in self.per_rank):
                raise ValueError(f"{name} cannot be the name of an object: give it another")
        self.models = {name: obj for name, obj in self.objects.items() if isinstance(obj, nn.Module)}
        self.optimizers: dict[str, tuple[nn.Module, Optimizer]] = {}
        for name, obj in self.objects.items():
            if isinstance(obj, Optimizer):
                params = {param for group in obj.param_groups for param in group["params"]}
                holding = [model for model in self.models.values() if params <= set(model.parameters())]
                if not holding:
                    raise ValueError(f"{name} holds parameters of no model that is given: give its model as well")
                self.optimizers[name] = holding[0], obj
        for name, model in self.models.items():
            ignored = set(getattr(model, "parameters_to_ignore", ()))  # of DistributedDataParallel
            if left_out := ignored & {key.removeprefix("module.") for key, _ in model.named_parameters()}:
                raise ValueError(
                    f"{min(left_out)} of {name} is left out by DistributedDataParallel, so each rank may have another: "
                    "save it in per_rank, as a module of its own"
                )
        known = self.models.keys() | self.optimizers.keys()
        self.others = {name: obj for name, obj in self.objects.items() if name not in known}

    def state_dict(self, pack: bool = True) -> dict[str, Any]:
        """Nested, by the name of each object; what each rank has of its own one level deeper.

        What is neither of a model nor of an optimizer is bytes that torch.save has made of its state dict, so that
        whatever is in that comes back as it was. pack: whether to make them; ranks behind the first have no need to.

        Raises:
            ValueError: such a state dict could not be loaded again without running code, or is sharded.
        """
        state: dict[str, Any] = {name: get_model_state_dict(model) for name, model in self.models.items()}
        state |= {name: state_by_name(*pair) for name, pair in self.optimizers.items()}
        first = pack and self.mine == "rank 0"
        state |= {name: _packed(obj, name) if first else b"" for name, obj in self.others.items()}
        state |= {name: {self.mine: _packed(obj, name) if pack else b""} for name, obj in self.per_rank.items()}
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        return {**state, RANDOM: {self.mine: random}}

    def state_dict_for(self, metadata: Metadata) -> dict[str, Any]:
        """To load a checkpoint into: without what a rank that was not there has not saved.

        Raises:
            ValueError: the checkpoint has entries of a model that this one does not have.
        """
        state = self.state_dict(pack=False)
        places = metadata.planner_data.items()
        held = {tuple(place[:2]) for _, place in places}
        for name in self.of_rank:
            state[name] = {mine: value for mine, value in state[name].items() if (name, mine) in held}
        for _, place in places:
            if place[0] in self.models and len(place) == 2 and place[1] not in state[place[0]]:
                raise ValueError(f"{place[1]} is in the checkpoint, and not in the {place[0]} that is given")
        if (unknown := {str(place[0]) for _, place in places} - state.keys()) and self.mine == "rank 0":
            warnings.warn(
                f"{', '.join(sorted(unknown))} of the checkpoint is not loaded: it was not given", stacklevel=2
            )
        for name, (_, optimizer) in self.optimizers.items():
            if _is_sharded(state[name]["state"]) or not is_plain(optimizer):
                continue
            state[name]["state"], own = {}, state[name]["state"]  # what the checkpoint has, as it may have less or more
            for fqn, place in places:
                if place[:2] == (name, "state"):
                    described = metadata.state_dict_metadata[fqn]
                    value = own.get(place[2], {}).get(place[3]) if len(place) == 4 else None
                    if isinstance(described, TensorStorageMetadata):
                        dtype = described.properties.dtype
                        if not isinstance(value, Tensor) or value.shape != described.size or value.dtype != dtype:
                            value = torch.empty(described.size, dtype=dtype)
                    set_element(state, place, value)
        return state

    def shared(self) -> set[int]:
        """Addresses of tensors that are the same on all ranks. Buffers are not, in DDP: those of the first count."""
        tensors: list[Any] = [param for model in self.models.values() for param in model.parameters()]
        for _, optimizer in self.optimizers.values():
            for entry in optimizer.state.values():
                tensors += entry.values() if isinstance(entry, dict) else ()
        return {tensor.data_ptr() for tensor in tensors if type(tensor) in (Tensor, nn.Parameter) and tensor.numel()}

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Raises RuntimeError if an object refuses its state; those before it have theirs then."""
        name = ""
        try:
            for name, model in self.models.items():
                set_model_state_dict(model, state[name])
            for name, pair in self.optimizers.items():  # which may make masters of the parameters
                set_state_by_name(*pair, state[name])
            for name, obj in self.others.items():
                obj.load_state_dict(_unpacked(state[name], name))
            for name, obj in self.per_rank.items():
                if self.mine in state[name]:
                    obj.load_state_dict(_unpacked(state[name][self.mine], name))
        except Exception as error:
            raise RuntimeError(f"{path} is half loaded, as {name} refuses its state, so end here: {error}") from error
        random = state[RANDOM].get(self.mine, {})
        if "cpu" in random:  # a rank that is new keeps its own
            torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])


def state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`, which lets an optimizer without state step.

    That would change its count of steps, or make momentum where there is none.
    """
    own = optimizer.state_dict()
    if _is_sharded(own["state"]):
        return get_optimizer_state_dict(model, optimizer)
    names = _names(model, optimizer)
    by_number = dict(enumerate(chain.from_iterable(names)))
    state = {by_number[number]: entry for number, entry in own["state"].items() if number in by_number and entry}
    groups = [{**group, "params": of_group} for group, of_group in zip(own["param_groups"], names, strict=True)]
    return {"state": state, "param_groups": groups}


def set_state_by_name(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`set_optimizer_state_dict`, likewise."""
    if not is_plain(optimizer) or _is_sharded(state["state"]):
        set_optimizer_state_dict(model, optimizer, state)
        return
    numbers = {name: number for number, name in enumerate(chain.from_iterable(_names(model, optimizer)))}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    entries = {numbers[name]: entry for name, entry in state["state"].items()}
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def is_plain(optimizer: Optimizer) -> bool:
    """Whether no parameter is sharded, as they are by FSDP2."""
    return not any(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Of the parameters of each group, as torch.distributed.checkpoint has them."""
    stand_in = torch.optim.SGD([{"params": list(group["params"])} for group in optimizer.param_groups], lr=0.0)
    stand_in.state = defaultdict(dict, {p: {} for group in stand_in.param_groups for p in group["params"]})
    named: Any = get_optimizer_state_dict(model, stand_in)
    return [group["params"] for group in named["param_groups"]]


def _kind(obj: Any) -> str:
    return type(obj).__name__


def _packed(obj: Any, name: str) -> bytes:
    state, stream = obj.state_dict(), io.BytesIO()
    if _is_sharded(state):
        raise ValueError(
            f"{name} has DTensors in its state, of which each rank holds a part: give a model or an optimizer"
        )
    torch.save(state, stream)
    stream.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(stream):  # or nobody could load it again
        raise UnsafeError(f"the state of {name}", unsafe[0])
    return stream.getvalue()


def _unpacked(packed: bytes, name: str) -> Any:
    return load_object(io.BytesIO(packed), f"the state of {name}")


def _is_sharded(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_is_sharded, value.values() if isinstance(value, dict) else value))
    return isinstance(value, DTensor)
