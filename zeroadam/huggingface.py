"""Saving under transformers' Trainer, which writes `optimizer.state_dict()` on one rank and tells no other."""

from typing import Any

from transformers import TrainerCallback, TrainerControl

from zeroadam.optimizer import ZeroAdam


class ConsolidateOnSave(TrainerCallback):
    """Gathers the state on the rank that is about to save it: `Trainer(..., callbacks=[ConsolidateOnSave()])`.

    Resuming needs nothing: every rank loads the file and keeps its share.
    """

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        """Trainer's own callbacks, which decide whether to save, have run before this one."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # in an AcceleratedOptimizer
        if control.should_save and isinstance(optimizer, ZeroAdam):
            optimizer.consolidate_state_dict(to=0)

    on_epoch_end = on_step_end
