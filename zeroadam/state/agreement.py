"""Whether all ranks build the same optimizer, and one that can be sharded; asked before anything can hang or drift."""

import math
import os
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from zeroadam._compat import on_device
from zeroadam.layout.places import overlapping
from zeroadam.state.dtensor import is_dtensor
from zeroadam.transport.alone import OneProcess
from zeroadam.transport.calls import digest_of, name_ranks

# What must be the same on every rank, as text, in the order in which differences are reported.
Manifest = dict[str, str]


def joined_group(process_group: Any) -> dist.ProcessGroup:
    """The given process group or else that of all ranks; in a script without torchrun, what stands for one.

    Also that of all ranks for what is no group: `check_process_group` refuses it where all ranks hear of it.

    Raises:
        RuntimeError: there are other ranks, but no process group.
        ValueError: this rank is not in the process group.
    """
    if not dist.is_initialized():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RuntimeError(
                "there is no process group: call torch.distributed.init_process_group() before building the optimizer; "
                "Accelerator() and transformers' TrainingArguments() do so: build it after them"
            )
        return cast(dist.ProcessGroup, OneProcess())
    outside = process_group is dist.GroupMember.NON_GROUP_MEMBER
    group = process_group if isinstance(process_group, dist.ProcessGroup) else dist.group.WORLD
    if outside or group is None or dist.get_rank(group) < 0:
        raise ValueError("this rank is not in process_group: build the optimizer on the ranks of the group only")
    return group


def check_process_group(process_group: Any) -> None:
    """Raise ValueError for what is neither a process group nor None."""
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        kind = type(process_group).__name__
        raise ValueError(f"process_group is one of torch.distributed.new_group(), or None for all ranks, not a {kind}")


def check_supported(group: dict[str, Any], index: int) -> None:
    """Raise ValueError for what torch's Adam takes but cannot be sharded."""
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: the all-gather passes no gradients on")
    if len(set(group["params"])) < len(group["params"]):
        raise ValueError(f"group {index} holds a parameter twice")
    for name, param in named(group, index):
        if not isinstance(param, Tensor):
            raise ValueError(f"{name} is a {type(param).__name__}, not a tensor")
        if param.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: build the optimizer after model.to_empty(device=...)")
        if param.layout != torch.strided:
            raise ValueError(f"{name} is sparse ({param.layout}), which Adam does not support: hold a dense one")
        if is_dtensor(param):
            raise ValueError(f"{name} is a DTensor, so torch.optim.Adam shards its state already")
        if param.is_complex():
            raise ValueError(f"{name} is complex, which is not supported: hold torch.view_as_real() of it instead")


def check_hyperparameters(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for values of a param group that torch.optim.Adam would refuse."""
    own = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay") if key in group}
    try:
        betas = own.get("betas", (0.0, 0.0))
        if len(betas) != 2 or any(isinstance(beta, str) for beta in betas):
            raise ValueError(f"Invalid betas: {betas}")
        capturable = any(isinstance(value, Tensor) for value in (own.get("lr"), *betas))  # which Adam asks for then
        torch.optim.Adam([torch.zeros(1)], **own, capturable=capturable, foreach=False)
        if any(math.isnan(float(value)) for value in (*betas, *(own[key] for key in own if key != "betas"))):
            raise ValueError("a value is nan")
    except Exception as error:  # also a TypeError, of what is no number
        raise ValueError(f"{where} has values that Adam does not take: {error}") from None


def check_memory(groups: Sequence[dict[str, Any]], trained: Collection[int], world_size: int) -> None:
    """Raise ValueError for parameters whose elements are not all of their own, of which updates would be lost.

    trained: the ids of those that count.
    """
    every = [pair for index, group in enumerate(groups) for pair in named(group, index)]
    params = [(name, param) for name, param in every if id(param) in trained]
    for name, param in params:
        if any(step == 0 and size > 1 for size, step in zip(param.shape, param.stride(), strict=True)):
            raise ValueError(f"{name} is expanded, one number for many elements: hold what was expanded, or a clone()")
    if world_size > 1 and (pair := overlapping([param for _, param in params])):
        one, other = (next(name for name, param in params if param is found) for found in pair)
        raise ValueError(
            f"{one} and {other} share memory, and each would undo the update of the other: make them one parameter, as "
            "in `decoder.weight = encoder.weight`, or give each memory of its own"
        )


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a gradient that Adam cannot take."""
    for param, grad in zip(params, grads, strict=True):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has a sparse gradient, which Adam does not support: build "
                "its module with sparse=False"
            )
        if grad.shape != param.shape:
            raise RuntimeError(f"a parameter of shape {tuple(param.shape)} has a gradient of shape {tuple(grad.shape)}")


def check_rank(rank: Any, process_group: dist.ProcessGroup) -> None:
    """Raise ValueError for what is no rank of the process group."""
    if rank not in range(process_group.size()):
        raise ValueError(f"there is no rank {rank!r} in a process group of {process_group.size()}")


def host() -> torch.device:
    return torch.device("cpu")


def check_ranks_agree(
    process_group: dist.ProcessGroup, describe: Callable[[], Manifest], device: Callable[[], torch.device] = host
) -> None:
    """Raise on every rank if the ranks' manifests differ, or if `describe` raises somewhere. A collective.

    device: through which the ranks talk if their backend has none but GPUs; asked for after `describe`.

    Raises:
        the exception of `describe()`: on the ranks where it raised;
        RuntimeError: on the others then, naming that rank; on all, naming the first difference and the ranks.
    """
    if found := find_difference(process_group, describe, device):
        raise RuntimeError(found)


def find_difference(
    process_group: dist.ProcessGroup, describe: Callable[[], Manifest], device: Callable[[], torch.device] = host
) -> str | None:
    """The first difference between the ranks' manifests in words, the same on all ranks. A collective.

    device: see `check_ranks_agree`.

    Raises:
        the exception of `describe()`: on the ranks where it raised; RuntimeError on the others then, naming that rank.
    """
    mine: Manifest = {}
    error: Exception | None = None
    try:
        mine = describe()
    except Exception as caught:
        error = caught
    failure = None if error is None else f"{type(error).__name__}: {error}"
    answers: list[Any] = [(failure, mine)] * process_group.size()
    if process_group.size() > 1:
        with on_device(device()):  # else all meet on the first GPU
            dist.all_gather_object(answers, (failure, mine), group=process_group)
    if error is not None:
        raise error
    for rank, (failure, _) in enumerate(answers):
        if failure is not None:
            raise RuntimeError(f"rank {rank} of the process group failed: {failure}")
    for entry in dict.fromkeys(entry for _, manifest in answers for entry in manifest):
        found: dict[str, list[int]] = {}
        for rank, (_, manifest) in enumerate(answers):
            found.setdefault(manifest.get(entry, "missing"), []).append(rank)
        if len(found) > 1:
            values = "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in found.items())
            return f"the ranks of the process group disagree on {entry}: {values}"
    return None


def describe_groups(groups: list[dict[str, Any]], first: int, defaults: dict[str, Any]) -> Manifest:
    """What must be the same on every rank of `groups[first:]`: parameters and hyper-parameters."""
    manifest = {"the number of param groups": str(len(groups))}
    for index, group in list(enumerate(groups))[first:]:
        manifest[f"the number of parameters in group {index}"] = str(len(group["params"]))
        for name, param in named(group, index):
            frozen = "" if param.requires_grad else ", frozen"
            manifest[name] = f"shape {tuple(param.shape)}, stride {param.stride()}, {param.dtype}{frozen}"
        manifest |= describe_hyperparameters(group, index, defaults)
    return manifest


def describe_values(groups: list[dict[str, Any]]) -> Manifest:
    """The values of all parameters, which must be the same on every rank when they are first used."""
    every = [entry for index, group in enumerate(groups) for entry in named(group, index)]
    # The bits of a quantized weight its class knows.
    compared = [(name, param) for name, param in every if type(param.detach()) is Tensor or param.requires_grad]
    cure = "wrap the model in DistributedDataParallel before the first step, or broadcast the parameters from one rank"
    values = fingerprints([param for _, param in compared])
    return {
        f"the values of {name} ({cure})": f"hash {value:x}" for (name, _), value in zip(compared, values, strict=True)
    }


def describe_hyperparameters(group: dict[str, Any], index: int, defaults: dict[str, Any]) -> Manifest:
    """The values in a param group of all keys that `defaults` has."""
    values = {f"{key} of group {index}": group[key] for key in defaults}
    return {entry: str(float(value) if isinstance(value, Tensor) else value) for entry, value in values.items()}


def digest_step(optimizer: Optimizer, layout: int, with_gradients: Sequence[int], steps: bytes) -> int:
    """31 bits of what must be the same on all ranks in a step: hyper-parameters, and which parameters have gradients.

    layout: a digest of the parameters. with_gradients: positions among all that are trained. steps: their counts.
    """
    groups, defaults = optimizer.param_groups, optimizer.defaults
    values = [_on_the_host(group.get(key)) for group in groups for key in defaults]
    return digest_of((values, layout, crc32(array("I", with_gradients)), crc32(steps)))


def describe_step(optimizer: Optimizer, numbers: Mapping[int, int], having: set[int]) -> Manifest:
    """The same by name, and whatever else the ranks may disagree on in a step.

    numbers: by the id of each parameter, in which order the optimizer got them. having: ids of those with gradients.
    """
    manifest = describe_groups(optimizer.param_groups, 0, optimizer.defaults)
    for index, group in enumerate(optimizer.param_groups):
        for name, param in named(group, index):
            manifest[f"which one {name} is"] = f"number {numbers[id(param)]} that the optimizer got"
            manifest[f"the gradient of {name}"] = "one" if id(param) in having else "none"
            manifest[f"the step of {name}"] = str(float(optimizer.state.get(param, {}).get("step", 0)))
    return manifest


def describe_training(optimizer: Optimizer) -> Manifest:
    """What must be the same on all ranks between two steps: parameters, steps and hyper-parameters, in this order."""
    every = [entry for index, group in enumerate(optimizer.param_groups) for entry in named(group, index)]
    hashes = fingerprints([param for _, param in every])
    manifest = {f"the values of {name}": f"hash {value:x}" for (name, _), value in zip(every, hashes, strict=True)}
    counted = [(name, optimizer.state[param]["step"]) for name, param in every if optimizer.state.get(param)]
    steps = read_scalars([step for _, step in counted])
    manifest |= {f"the step of {name}": str(float(step)) for (name, _), step in zip(counted, steps, strict=True)}
    for index, group in enumerate(optimizer.param_groups):
        manifest |= describe_hyperparameters(group, index, optimizer.defaults)
    return manifest


def _on_the_host(value: Any) -> Any:
    """A hyper-parameter, unless it is on a device that may not have computed it yet."""
    if isinstance(value, (tuple, list)):
        return [_on_the_host(item) for item in value]
    if isinstance(value, Tensor):
        return float(value) if value.is_cpu else None
    return value


def named(group: dict[str, Any], index: int) -> list[tuple[str, Tensor]]:
    """The parameters of a param group with the names to call them by in messages."""
    names = group.get("param_names") or ()
    if len(names) != len(group["params"]):  # none, or the user has changed the parameters since
        names = [f"{position} of group {index}" for position in range(len(group["params"]))]
    return [(f"parameter {name}", param) for name, param in zip(names, group["params"], strict=True)]


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """A 64-bit hash of the bits of each tensor [d0, ...]; waits for a device once."""
    return [value % 2**64 for value in read_scalars([_fingerprint(tensor) for tensor in tensors])]


def read_scalars(scalars: Sequence[Any]) -> list[Any]:
    """The numbers in tensors [], or numbers themselves, in one copy from each device for each dtype."""
    found = list(scalars)
    kinds: dict[Any, list[int]] = {}
    for index, scalar in enumerate(scalars):
        if isinstance(scalar, Tensor):
            kinds.setdefault((scalar.device, scalar.dtype), []).append(index)
    for indices in kinds.values():
        for index, value in zip(indices, torch.stack([scalars[i].reshape(()) for i in indices]).tolist(), strict=True):
            found[index] = value
    return found


def _fingerprint(tensor: Tensor) -> Tensor:
    """[] int64 on the device of `tensor`; a single differing element always changes it.

    The sum, modulo 2^64, of eight bytes at a time as an integer, times an odd number made of their position.
    """
    # What stays in cache; elsewhere few launches, with some 50 MB of temporary memory.
    chunk_numel = 2**17 if tensor.device.type == "cpu" else 2**21
    weights = torch.arange(1, 2 * min(tensor.numel(), chunk_numel) + 16, 2, device=tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, chunk in enumerate(tensor.detach().reshape(-1).split(chunk_numel)):
        data = chunk.clone().view(torch.uint8)  # a clone begins at a multiple of eight bytes
        whole = data.numel() // 8 * 8
        words = torch.cat([data[:whole].view(torch.int64), data[whole:].to(torch.int64)])
        total += (words * weights[: words.numel()]).sum() * (2 * index + 1)
    return total
