"""torch's functional Adam with the hyper-parameters of a param group, and which of these it takes."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "fused", "differentiable", "decoupled_weight_decay")
KEYS = ("params", "lr", "betas", "eps", "weight_decay", *FLAGS)

Views = list[Tensor]


def run_adam(
    weights: Views, grads: Views, moments: Mapping[str, Views], steps: Views, group: Mapping[str, Any]
) -> None:
    """torch's functional Adam with the hyper-parameters of a param group, on tensors of one dtype and device."""
    beta1, beta2 = group["betas"]
    lr, weight_decay, eps = group["lr"], group["weight_decay"], group["eps"]
    if group["fused"] and not any(isinstance(n, Tensor) for n in (lr, beta1, beta2)):
        # What `adam` does then, but for sorting the tensors by dtype and device, a quarter of its host time.
        torch._foreach_add_(steps, 1)
        fused = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        fused(
            weights,
            grads,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            moments["max_exp_avg_sq"],
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=None,
            found_inf=None,
        )
        return
    adam(
        weights,
        grads,
        moments["exp_avg"],
        moments["exp_avg_sq"],
        moments["max_exp_avg_sq"],
        steps,
        foreach=group["foreach"],
        capturable=group["capturable"],
        fused=group["fused"],
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )


def try_groups(groups: Sequence[Mapping[str, Any]], kinds: Collection[tuple[int, torch.dtype, torch.device]]) -> None:
    """Raise ValueError for settings that torch's Adam refuses, before a step has changed anything.

    kinds: the index of a param group, and what it has parameters of.
    """
    for index, dtype, device in sorted(kinds, key=str):
        if groups[index]["differentiable"]:
            raise ValueError("differentiable=True is not supported: the all-gather passes no gradients on")
        try:
            _try_group(groups[index], dtype, device)
        except Exception as error:
            raise ValueError(f"torch's Adam refuses param group {index}: {error}") from error


def _try_group(group: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Run Adam on single numbers, of no and of one dimension, so that it raises here for what it refuses."""
    for shape in ((), (1,)):
        numbers: dict[str, Views] = {
            name: [torch.zeros(shape, dtype=dtype, device=device)] for name in ("weight", "grad", *MOMENTS)
        }
        if not group["amsgrad"]:
            numbers["max_exp_avg_sq"] = []
        on_device = group["fused"] or group["capturable"]
        steps = [torch.zeros((), device=device if on_device else "cpu")]
        run_adam(numbers["weight"], numbers["grad"], numbers, steps, group)


def refuse_capture(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError in the capture of a CUDA graph unless all groups are capturable, as torch's Adam does."""
    on_cuda = [group for group in groups if any(param.is_cuda for param in group["params"][:1])]
    if on_cuda and torch.cuda.is_current_stream_capturing() and not all(group["capturable"] for group in on_cuda):
        raise RuntimeError("a CUDA graph is being captured, which needs capturable=True in every param group")


def check_group(group: Any, index: int) -> tuple[Any, ...]:
    """What Adam must accept of a param group, but for numbers that may be any.

    Raises:
        ValueError: something is missing, or is not a number.
    """
    if not isinstance(group, dict):
        raise ValueError(f"param group {index} is a {type(group).__name__}, not a dict")
    for key in KEYS:
        if key not in group:
            raise ValueError(f"param group {index} has no {key!r}: give it one, or use optimizer.add_param_group()")
    if not isinstance(group["params"], (list, tuple)):
        raise ValueError(f"params of param group {index} is a {type(group['params']).__name__}, not a list")
    betas = group["betas"]
    if not hasattr(betas, "__len__") or len(betas) != 2:
        raise ValueError(f"betas of param group {index} are {betas}, not two numbers")
    numbers = (group["lr"], group["eps"], group["weight_decay"], *betas)
    kinds: list[Any] = []
    for key, value in zip(("lr", "eps", "weight_decay", "beta1", "beta2"), numbers, strict=True):
        if isinstance(value, Tensor):
            is_number = value.numel() == 1 and not (value.is_complex() or value.is_meta)
            kinds.append((value.dtype, value.device, value.dim(), value.requires_grad))
        else:
            is_number = _is_number(value)
            kinds.append(type(value))
        if not is_number:
            raise ValueError(f"{key} of param group {index} is {value!r}, not a number")
    # The values of betas, as Adam divides by what it makes of them.
    return (*(group[key] for key in FLAGS), *kinds, *(b for b in betas if not isinstance(b, Tensor)))


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, str)
