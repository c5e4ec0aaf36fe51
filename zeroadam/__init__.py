"""Adam for PyTorch data parallelism with its state cut across the ranks (ZeRO stage 1)."""

from zeroadam.optimizer import ZeroAdam, ZeroAdamW

__all__ = ["ZeroAdam", "ZeroAdamW"]
