"""What a checkpoint holds: models, optimizers of their parameters, and whatever else has a state."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zeroadam.untrusted import load_object

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
        known = self.models.keys() | self.optimizers.keys()
        self.others = {name: obj for name, obj in self.objects.items() if name not in known}

    def state_dict(self) -> dict[str, Any]:
        """Nested, by the name of each object; what each rank has of its own one level deeper.

        What is neither of a model nor of an optimizer is bytes that torch.save has made of its state dict, so that
        whatever is in that comes back as it was.

        Raises:
            ValueError: such a state dict could not be loaded again without running code, or is sharded; an optimizer of
                a kind that torch.distributed.checkpoint does not take.
        """
        state: dict[str, Any] = {name: get_model_state_dict(model) for name, model in self.models.items()}
        for name, pair in self.optimizers.items():
            try:
                state[name] = get_optimizer_state_dict(*pair)
            except Exception as error:  # such as LBFGS, which takes no step without a closure
                raise ValueError(f"torch makes no state dict by name of {name}, a {_kind(pair[1])}: {error}") from error
        state |= {name: _packed(obj, name) for name, obj in self.others.items()}
        state |= {name: {self.mine: _packed(obj, name)} for name, obj in self.per_rank.items()}
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        return {**state, RANDOM: {self.mine: random}}

    def state_dict_for(self, metadata: Metadata) -> dict[str, Any]:
        """To load a checkpoint into: without what a rank that was not there has not saved.

        Raises:
            ValueError: the checkpoint has entries of a model that this one does not have.
        """
        state = self.state_dict()
        held = {tuple(place[:2]) for place in metadata.planner_data.values()}
        for name in self.of_rank:
            state[name] = {mine: value for mine, value in state[name].items() if (name, mine) in held}
        for place in metadata.planner_data.values():
            if place[0] in self.models and len(place) == 2 and place[1] not in state[place[0]]:
                raise ValueError(f"{place[1]} is in the checkpoint, and not in the {place[0]} that is given")
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
                set_optimizer_state_dict(*pair, state[name])
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


def _kind(obj: Any) -> str:
    return type(obj).__name__


def _packed(obj: Any, name: str) -> bytes:
    state, stream = obj.state_dict(), io.BytesIO()
    if _is_sharded(state):
        raise ValueError(
            f"{name} has DTensors in its state, of which each rank holds a part: give a model or an optimizer"
        )
    torch.save(state, stream)
    _unpacked(stream.getvalue(), name)  # or nobody could load it again
    return stream.getvalue()


def _unpacked(packed: bytes, name: str) -> Any:
    return load_object(io.BytesIO(packed), f"the state of {name}")


def _is_sharded(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_is_sharded, value.values() if isinstance(value, dict) else value))
    return isinstance(value, DTensor)
