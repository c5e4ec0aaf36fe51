"""Adam for PyTorch data parallelism with its state sharded over the ranks (ZeRO stage 1).

What is public is imported when it is first asked for, so that `zeroadam --help` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroadam.memory_plan import plan
    from zeroadam.optimizer import ZeroAdam, ZeroAdamW
    from zeroadam.plain_file import save
    from zeroadam.reduce.clip import clip_grad_norm_, clip_grad_value_
    from zeroadam.reduce.grad_scaler import GradScaler
    from zeroadam.reduce.hook import bf16_reduce_scatter_hook, reduce_scatter_hook
    from zeroadam.report import StepReport

__version__ = "0.1.0"
__all__ = [
    "GradScaler",
    "StepReport",
    "ZeroAdam",
    "ZeroAdamW",
    "bf16_reduce_scatter_hook",
    "clip_grad_norm_",
    "clip_grad_value_",
    "plan",
    "reduce_scatter_hook",
    "save",
]
_MODULES = {
    "GradScaler": "reduce.grad_scaler",
    "StepReport": "report",
    "ZeroAdam": "optimizer",
    "ZeroAdamW": "optimizer",
    "bf16_reduce_scatter_hook": "reduce.hook",
    "clip_grad_norm_": "reduce.clip",
    "clip_grad_value_": "reduce.clip",
    "plan": "memory_plan",
    "reduce_scatter_hook": "reduce.hook",
    "save": "plain_file",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
