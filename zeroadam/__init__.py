"""Adam for PyTorch data parallelism with its state sharded over the ranks (ZeRO stage 1)."""

from zeroadam.memory_plan import plan
from zeroadam.optimizer import ZeroAdam, ZeroAdamW
from zeroadam.plain_file import save
from zeroadam.reduce.clip import clip_grad_norm_, clip_grad_value_
from zeroadam.reduce.grad_scaler import GradScaler
from zeroadam.reduce.hook import bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.report import StepReport

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
