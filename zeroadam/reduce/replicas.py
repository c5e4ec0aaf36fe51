"""Sums of hybrid sharding to which another backward adds.

After a backward the owner of a piece holds its sum over all ranks, in every replica. If all of them went on with it, it
would count once for each. So the first replica does, and the others empty their pieces before the next backward adds.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zeroadam._compat import adds_to_grad, current_graph_task_id
from zeroadam.layout.shard import shard
from zeroadam.reduce.ownership import reduced_of


class ReplicaSums:
    """Of a rank; nothing happens in the first replica.

    Args:
        process_group: the shard group.
        replica: which one this rank is in.
        fail: raises RuntimeError with a message, here and on the other ranks.
    """

    def __init__(self, process_group: Any, replica: int, fail: Callable[[str], Any]) -> None:
        self.process_group, self.replica, self.fail = process_group, replica, fail
        self.whole: set[int] = set()  # ids of the parameters whose gradients show sums over all ranks
        self._watched = WeakTensorKeyDictionary()  # parameters with a hook that calls `empty`

    def note(self, params: Sequence[Tensor]) -> None:
        """The hook has summed their gradients; those of 0-d are means, which add up as they are."""
        for param in params if self.replica > 0 else ():
            reduced = reduced_of(param)
            if param.dim() == 0 or (reduced is not None and id(param) in reduced.sums):
                continue  # float32 sums are emptied by themselves
            self.whole.add(id(param))
            if param.requires_grad and param not in self._watched:
                self._watched[param] = param.register_hook(partial(self._before_adding, weakref.ref(param)))

    def _before_adding(self, reference: "weakref.ref[Tensor]", _: Tensor) -> None:
        param = reference()
        if param is not None and id(param) in self.whole and adds_to_grad(param):
            self.empty([param])

    @torch.no_grad()
    def empty(self, params: Sequence[Tensor]) -> None:
        """Empty this rank's pieces of what the hook has summed, unless they are gone.

        Before a backward adds to them; and before they are reduced, of those for which it has nothing.
        """
        for param in params if self.whole else ():
            if id(param) not in self.whole:
                continue
            self.whole.discard(id(param))
            grad, reduced = param.grad, reduced_of(param)
            if grad is None or reduced is None or grad.untyped_storage().data_ptr() != reduced.storage:
                continue  # a gradient of this rank's own
            if not reduced.is_whole(grad, current_graph_task_id()):
                self.fail(
                    f"the gradient of a parameter of shape {tuple(param.shape)} was changed between two backwards, "
                    "which add up over the replicas of device_mesh: change gradients before step() only, or accumulate "
                    "in model.no_sync()"
                )
            shard(grad, self.process_group.size(), self.process_group.rank()).zero_()
