"""A rank's own state is 1/W of the optimizer's. Saving it as if it were the whole is an error."""

import copy
import inspect
from typing import Any, NoReturn

PART = (
    "this rank has a part of the optimizer's state, the other ranks hold the rest. For one plain file call "
    "zeroadam.save({'optimizer': optimizer, ...}, file) on all ranks; or optimizer.consolidate_state_dict(to=0) on all "
    "ranks first, and then optimizer.state_dict() and torch.save() on rank 0. For torch.distributed.checkpoint.save(), "
    "and for load_state_dict() on the same ranks, ask for optimizer.state_dict(sharded=True). With Accelerate: "
    "accelerator.register_save_state_pre_hook(lambda *_: optimizer.optimizer.consolidate_state_dict()); with "
    "transformers' Trainer: callbacks=[zeroadam.huggingface.ConsolidateOnSave()]"
)


class ShardedState(dict[Any, Any]):
    """The entry "state" of a state dict, of which other ranks hold the rest: it is not for `torch.save`."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RuntimeError(PART)

    def __copy__(self) -> "ShardedState":
        return ShardedState(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedState":
        return ShardedState((key, copy.deepcopy(value, memo)) for key, value in self.items())


LEFT_OUT = "a sharded optimizer is left out of what is pickled: use zeroadam.save(), with it in a dict, list or tuple"


class LeftOut:
    """What a pickled object has in place of a sharded optimizer, such as a DDP model in its communication hook."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name}: a sharded optimizer is left out of what is pickled, use zeroadam.save()")


def called_by_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint, or what stands in for it here, is among the callers."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("torch.distributed.checkpoint", "zeroadam.checkpoint")):
            return True
        frame = frame.f_back
    return False
