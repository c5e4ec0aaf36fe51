"""Adam for PyTorch data parallelism with its state cut across the ranks (ZeRO stage 1)."""

from zeroadam.comm_hook import bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.grad_scaler import GradScaler
from zeroadam.memory import plan
from zeroadam.optimizer import ZeroAdam, ZeroAdamW
from zeroadam.report import StepReport

__all__ = [
    "GradScaler",
    "StepReport",
    "ZeroAdam",
    "ZeroAdamW",
    "bf16_reduce_scatter_hook",
    "plan",
    "reduce_scatter_hook",
]
