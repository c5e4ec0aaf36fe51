"""transformers' Trainer with sharded state, and with `reduce_scatter_hook`."""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl

from zeroadam.optimizer import ZeroAdam
from zeroadam.reduce.hook import reduce_scatter_hook

# What ReduceScatter is mixed into; a class that knows nothing of it while it runs.
Base: Any = Trainer if TYPE_CHECKING else object


class ConsolidateOnSave(TrainerCallback):
    """Gathers the state on the rank that is about to save it: `Trainer(..., callbacks=[ConsolidateOnSave()])`.

    Trainer writes `optimizer.state_dict()` on one rank and tells no other. Resuming needs nothing: every rank loads the
    file and keeps its share.
    """

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        """Trainer's own callbacks, which decide whether to save, have run before this one."""
        optimizer = sharded(kwargs["optimizer"])
        if control.should_save and optimizer is not None:
            optimizer.consolidate_state_dict(to=0)

    on_epoch_end = on_step_end


class ReduceScatter(Base):
    """Gives a Trainer the hook: `class MyTrainer(ReduceScatter, SFTTrainer): pass`. `ZeroTrainer` is one for Trainer.

    It sets DistributedDataParallel's `gradient_as_bucket_view`, registers `hook` when the model is wrapped, lets the
    optimizer clip, and has `ConsolidateOnSave`. Optimizers other than ZeroAdam are trained as before.
    """

    hook = staticmethod(reduce_scatter_hook)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hooked: nn.Module | None = None
        self.add_callback(ConsolidateOnSave())
        self.add_callback(_RegisterHook(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Also called by Trainer when it begins anew with a smaller batch."""
        super().create_accelerator_and_postprocess()
        accelerator, clip = self.accelerator, self.accelerator.clip_grad_norm_
        if accelerator.ddp_handler is not None:
            accelerator.ddp_handler.gradient_as_bucket_view = True

        def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            optimizer = sharded(self.optimizer)
            if optimizer is None:
                return clip(parameters, max_norm, norm_type)
            accelerator.unscale_gradients()
            return optimizer.clip_grad_norm_(max_norm, norm_type)

        accelerator.clip_grad_norm_ = clip_grad_norm_

    def register_hook(self) -> None:
        """Once for each DistributedDataParallel; nothing on a single process, which has none."""
        found = (module for module in self.model_wrapped.modules() if isinstance(module, DistributedDataParallel))
        model, optimizer = next(found, None), sharded(self.optimizer)
        if model is not None and optimizer is not None and model is not self._hooked:
            model.register_comm_hook(optimizer, self.hook)
            self._hooked = model


class ZeroTrainer(ReduceScatter, Trainer):
    """`transformers.Trainer` with the hook, for `optimizer_cls_and_kwargs=(ZeroAdamW, {"lr": 1e-3})`."""


class _RegisterHook(TrainerCallback):
    """When all is prepared, before the first batch."""

    def __init__(self, trainer: ReduceScatter) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        self.trainer.register_hook()


def sharded(optimizer: Any) -> ZeroAdam | None:
    """A ZeroAdam, also one in Accelerate's AcceleratedOptimizer."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, ZeroAdam) else None
