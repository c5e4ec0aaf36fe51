"""Who owns a parameter, who has summed its gradient, and is the gradient still that sum?

Gradients that live on their owner only must not be changed by code that believes that all ranks see the same, such as
clipping by this rank's norm. That would be wrong in silence. So the hook notes what it wrote, and `step()` compares.
"""

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SAMPLE_STEP = 1024


@runtime_checkable
class Owner(Protocol):
    """What is used here of the optimizer, which imports all of this."""

    process_group: dist.ProcessGroup  # over which state is cut
    all_ranks: dist.ProcessGroup  # over which gradients are summed
    reduction: Any  # its `zeroadam.reduce.hook.Reduction`
    _plan: Any  # its `zeroadam.step_plan.StepPlan`
    param_groups: list[dict[str, Any]]
    _step_supports_amp_scaling: bool
    _join_config: Any

    @property
    def join_device(self) -> torch.device: ...

    def step(self) -> Any: ...

    def _begin(self, call: int, describe: Callable[[], str]) -> None: ...


class Reduced:
    """What the hook last wrote to the gradients of one DDP bucket: where, which version, summed over whom, some values.

    Changes through `p.grad.data` have a version counter of their own, so the version does not tell of them. On the CPU
    values of this rank's pieces do: a few of each piece and one in SAMPLE_STEP, or all with
    ZEROADAM_CHECK_GRADIENTS=all.

    Args:
        pieces: of the gradients, [c, ...] each, in the memory of the bucket.
        strides: of the gradients, by the id of the parameter.
        means: whether the pieces are means, not sums (see `zeroadam.reduce.means`).
        sums: by the id of the parameter, each `zeroadam.reduce.float_sums.FloatSum` that the gradients show rounded.
    """

    def __init__(
        self,
        storage: int,
        group_name: str,
        pieces: Sequence[Tensor],
        strides: dict[int, tuple[int, ...]],
        means: bool = False,
        sums: Mapping[int, Any] | None = None,
    ) -> None:
        self.means, self.sums = means, sums or {}
        self.storage, self.version, self.group_name, self.strides = storage, -1, group_name, strides
        self._seen = -1, False  # the backward before which the gradients were looked at, and whether they were whole
        self.lost = 0  # how many of its parameters have been reduced in another DDP bucket since
        # Not the pieces themselves, which would keep the memory of the bucket alive.
        self._places = [(tuple(p.shape), p.stride(), int(p.storage_offset())) for p in pieces if p.is_cpu and p.numel()]
        self._sampled: Tensor | None = None  # positions in the storage, [n]
        self._values: Tensor | None = None

    def still_in(self, grad: Tensor) -> bool:
        return grad.untyped_storage().data_ptr() == self.storage and grad._version == self.version

    def is_whole(self, grad: Tensor, backward: int) -> bool:
        """Whether a gradient is what the hook wrote, before a backward adds to it. The first look is at all of them."""
        if backward == -1 or self._seen[0] != backward:
            self._seen = backward, self.still_in(grad) and self.has_its_values(grad)
        return self._seen[1] and grad.untyped_storage().data_ptr() == self.storage

    def remember(self, grad: Tensor) -> None:
        """Take a gradient of the bucket, and all others, for what the hook wrote."""
        self.version = grad._version
        if self._places:
            self._values = self._sample(grad)

    def has_its_values(self, grad: Tensor) -> bool:
        return self._values is None or torch.equal(self._sample(grad), self._values)

    def _sample(self, grad: Tensor) -> Tensor:
        if self._sampled is None:
            self._sampled = torch.cat([_positions(*place) for place in self._places])
        whole = grad.detach().as_strided((grad.untyped_storage().nbytes() // grad.itemsize,), (1,), 0)
        return whole.index_select(0, self._sampled).view(torch.uint8)  # as bits, since a nan is not equal to itself


def _positions(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """Of some elements of a tensor, evenly spaced, in its storage: [n]."""
    numel = math.prod(shape)
    count = numel if os.environ.get("ZEROADAM_CHECK_GRADIENTS") == "all" else min(numel, 8 + numel // SAMPLE_STEP)
    chosen = torch.unravel_index(torch.linspace(0, numel - 1, count, dtype=torch.float64).long(), shape or (1,))
    return offset + torch.stack([index * step for index, step in zip(chosen, stride or (1,), strict=True)]).sum(dim=0)


# Ownership depends on shape and W alone: an optimizer can step on what was reduced by a hook on another one.
_owners: list["weakref.ref[Any]"] = []  # all there are, oldest first
_left: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> weak reference to whose group it has left
_reduced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> Reduced
_changes = 0


def changes() -> int:
    """How often `reduced_of` has changed for some parameter."""
    return _changes


def note(params: Iterable[Tensor], reduced: Reduced) -> None:
    """Remember that the gradients of parameters are what the hook wrote last."""
    global _changes
    for param in params:
        before: Reduced | None = _reduced.get(param)
        if before is reduced:
            continue
        if before is not None:
            before.lost += 1
        _reduced[param] = reduced
        _changes += 1


def reduced_of(param: Tensor) -> Reduced | None:
    """What the hook last wrote to the gradient of a parameter, if it ever did."""
    return _reduced.get(param) if _reduced else None


def check_reduced(
    param: Tensor, grad: Tensor, reduced: Reduced, process_group: dist.ProcessGroup, values: bool = False
) -> None:
    """Raise RuntimeError if a gradient is not what the hook made it, or was summed over another process group.

    values: whether to compare some values of all gradients in the same DDP bucket, in place of this one's strides.
    """
    if reduced.group_name != process_group.group_name:
        raise RuntimeError(
            "gradients were summed over another process group than that of the optimizer that holds the parameters: "
            "register the hook with an optimizer of the same group"
        )
    if values:
        unchanged = reduced.still_in(grad) and reduced.has_its_values(grad)
    else:
        unchanged = reduced.still_in(grad) and grad.stride() == reduced.strides[id(param)]
    if not unchanged:
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(param.shape)}, or of one in the same DDP bucket, was changed "
            "after reduce_scatter_hook summed it, which only its owner would notice: clip with "
            "optimizer.clip_grad_norm_(), not with torch.nn.utils.clip_grad_norm_(), or with "
            "optimizer.clip_grad_value_(); scale with zeroadam.GradScaler; end accumulation with a backward outside of "
            "no_sync(); mask with p.register_hook(), which runs before the sum; for all else train without the hook. "
            "To go on without it, build a new optimizer and load this one's state"
        )


def forget_old(params: Iterable[Tensor]) -> None:
    """For a new optimizer: forget what a hook wrote to gradients that are gone. If it runs again, it notes it anew."""
    global _changes
    for param in params:
        reduced = reduced_of(param)
        if reduced is not None and (param.grad is None or not reduced.still_in(param.grad)):
            del _reduced[param]
            reduced.lost += 1
            _changes += 1


def accept_zeroing(params: Iterable[Tensor]) -> Callable[[], None]:
    """To be called before gradients are zeroed in place; gives a function for afterwards.

    The gradients of a DDP bucket share their version counter, so zeroing some of them looks like a change of all.
    """
    unchanged: dict[int, tuple[Tensor, Reduced]] = {}
    sums = []  # of gradients, in float32
    for param in params:
        reduced = reduced_of(param)
        if reduced is not None and param.grad is not None:
            sums += [reduced.sums[id(param)]] if id(param) in reduced.sums else []
            if reduced.still_in(param.grad):
                unchanged[id(reduced)] = (param.grad, reduced)

    def accept() -> None:
        for grad, reduced in unchanged.values():
            reduced.remember(grad)
        for one in sums:
            one.zero()

    return accept


def register(owner: Owner) -> None:
    """Let `owners_of` find an optimizer, without keeping it alive."""
    _owners[:] = [other for other in _owners if other() is not None] + [weakref.ref(owner)]


def mark_left(params: Iterable[Tensor], owner: Owner) -> None:
    """Remember who had parameters in its groups that were taken out, as DDP still reduces them.

    Not of those that are there, as torch swaps no tensor that has weak references (`torch.utils.swap_tensors`).
    """
    reference = weakref.ref(owner)
    for param in params:
        _left[param] = reference


def held_params() -> set[int]:
    """The ids of all parameters that are in a param group of some optimizer."""
    owners = (reference() for reference in _owners)
    return {id(p) for owner in owners if owner is not None for group in owner.param_groups for p in group["params"]}


def owners_of(
    params: Sequence[Tensor], process_group: dist.ProcessGroup | None = None, first: Owner | None = None
) -> list[Owner]:
    """The optimizer in whose param groups each parameter is, or was last, over this process group if there is one.

    first: the one to take where it is among them; else the newest is.

    Raises:
        RuntimeError: there is none for some parameter.
    """
    found: dict[int, Owner] = {}
    before: dict[int, Owner] = {}  # likewise, as of their last step
    for owner in [*(reference() for reference in _owners), first]:
        if owner is not None and process_group in (None, owner.process_group):
            found |= {id(param): owner for group in owner.param_groups for param in group["params"]}
            before |= {id(param): owner for param in owner._plan.every}
    for param in params:
        last = before.get(id(param)) or (_left[param]() if param in _left else None)
        if last is not None and process_group in (None, last.process_group):
            found.setdefault(id(param), last)
        if id(param) not in found:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} is reduced by reduce_scatter_hook, but no ZeroAdam of the "
                "same process group holds it: give all the model's trained parameters to such optimizers"
            )
    return [found[id(param)] for param in params]
