"""Every private name of torch that is used here, each with why. A test asks whether all of them are there."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

# The number of the backward that is running, -1 outside of one. A hook has to tell one backward from the next, and
# forward hooks the forward from its repetition by activation checkpointing. There is no public way to ask.
current_graph_task_id = torch._C._current_graph_task_id

# Calls a function at the end of the backward that is running. DDP and FSDP do the same.
queue_callback = torch.autograd.Variable._execution_engine.queue_callback

# Keeps a function out of torch.compile's graphs as torch.compiler.disable does, which imports torch._dynamo at once:
# as long as all of zeroadam and torch take together. torch's own optimizers use this one.
disable_dynamo = torch._disable_dynamo


def flatten_state_dict(state_dict: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(entries by name, where each of them was), as torch's planners have them."""
    from torch.distributed.checkpoint import _nested_dict  # late, as it takes long

    return _nested_dict.flatten_state_dict(state_dict)


def set_element(root: dict[str, Any], place: Any, value: Any) -> None:
    """Put a value where `flatten_state_dict` has found it."""
    from torch.distributed.checkpoint import _nested_dict

    _nested_dict.set_element(root, place, value)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes an accelerator the current one for a while."""
    if hasattr(torch.accelerator, "device_index"):
        return torch.accelerator.device_index(device.index)
    if device.type == "cpu":
        return contextlib.nullcontext()
    manager: AbstractContextManager[Any] = torch.get_device_module(device).device(device.index)  # in older torch
    return manager


def adds_to_grad(param: Tensor) -> bool:
    """Whether the backward that has come to a parameter adds to `p.grad`, which `torch.autograd.grad` does not.

    torch tells by an error only, as it has no answer for a leaf there.
    """
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(param).node))
    except RuntimeError:
        return False


def timeout_of(process_group: dist.ProcessGroup, device_type: str) -> float:
    """The seconds after which the group's backend for a device gives up."""
    seconds: float = process_group._get_backend(torch.device(device_type)).options._timeout.total_seconds()
    return seconds


def grouped(
    calls: Sequence[Callable[..., Any]], process_group: dist.ProcessGroup, device: torch.device
) -> list[dist.Work]:
    """Start collectives in one launch where the backend can, as NCCL does; torch has no public way to ask for it.

    calls: take `group` and `async_op`, and give a work.
    """
    if not process_group._get_backend(device).supports_coalescing:
        return [call(group=process_group, async_op=True) for call in calls]
    with dist._coalescing_manager(process_group, device, async_ops=True) as works:
        for call in calls:
            call(group=process_group, async_op=True)
    return [works]


# Used where they are needed.
PRIVATE = {
    "_C": "see above",
    "_current_graph_task_id": "see above",
    "_will_engine_execute_node": "see above",
    "_execution_engine": "see above",
    "_coalescing_manager": "see above",
    "_disable_dynamo": "see above",
    "_get_backend": "see above",
    "_timeout": "see above",
    "_amp_foreach_non_finite_check_and_unscale_": "of GradScaler, for sums of gradients that it does not see",
    "_base": "the tensor of which a gradient is a view: whether it lies in memory that stays, as in a DDP bucket",
    "_version": "how often a tensor was changed in place: whether a gradient is still what the hook wrote",
    "_foreach_add_": "lists of tensors in one call; torch's own optimizers and clipping are made of these",
    "_foreach_clamp_max_": "likewise",
    "_foreach_clamp_min_": "likewise",
    "_foreach_copy_": "likewise",
    "_foreach_div": "likewise",
    "_foreach_div_": "likewise",
    "_foreach_mul_": "likewise",
    "_foreach_norm": "likewise",
    "_foreach_zero_": "likewise",
    "_fused_adam_": "the kernels of torch's functional Adam, called without its sorting of tensors",
    "_fused_adamw_": "likewise",
    "_join_config": "of Joinable: whether this is inside of Join, which asks the model first",
    "_per_optimizer_states": "of GradScaler: the infinities that it found, on which the ranks have to agree",
}
