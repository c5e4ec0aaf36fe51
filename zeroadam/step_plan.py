"""What a step works on, laid out ahead, and how it follows what the user does to the optimizer.

`param_groups`, `state` and `p.grad` belong to the user: a step takes them as they are, as torch's Adam does. A plan is
a cache of them in three layers, and each step begins by comparing identities and addresses with what they were:

    buckets      of the parameters, their order, places in memory and dtypes; the same on every rank
    states       of the entries of `state`
    gradients    of `p.grad`, and of which of them reduce_scatter_hook has summed

Only a layer that differs is laid out anew. Whatever cannot be followed is refused here, before anything has changed.
"""

import itertools
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any, cast

import torch
from torch import Tensor

from zeroadam.gather.param_bucket import ParamBucket, make_buckets, use_staging
from zeroadam.layout.places import dtype_of, identical, places_of
from zeroadam.layout.shard import shard_index
from zeroadam.reduce.gradients import Gradients, Notes, find_notes
from zeroadam.reduce.ownership import Owner, changes, check_reduced, mark_left
from zeroadam.state.agreement import check_gradients, check_memory, check_supported
from zeroadam.state.step_counts import StepCounts
from zeroadam.state.storage import ParamState, Storage
from zeroadam.transport import Transports
from zeroadam.transport.calls import digest_of
from zeroadam.update.adam import Update, scratch_numel
from zeroadam.update.block import Scratch
from zeroadam.update.hyperparameters import check_group, try_groups
from zeroadam.update.piece import Piece

_grad_of, _items_of = attrgetter("grad"), methodcaller("values")

Groups = Sequence[dict[str, Any]]
# Kinds of gradients whose updates are kept: some models leave out parameters in turn.
MAX_UPDATES = 4


class StepPlan:
    """The buckets of an optimizer, and the updates of each.

    Args:
        optimizer: whose `param_groups` and `state` are followed.
        forget_others: called when parameters were removed, for the hook to let go of them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        storage: Storage,
        transports: Transports,
        forget_others: Callable[[], None],
    ) -> None:
        self.optimizer, self.storage, self.transports = optimizer, storage, transports
        self.forget_others = forget_others
        self.rank, self.world_size = storage.rank, storage.world_size
        self.params: list[Tensor] = []  # all that are trained, in the order of their groups
        self.buckets: list[ParamBucket] = []
        # For each bucket the updates of its parameters that have gradients, each with the index of its param group.
        self.updates: list[list[tuple[int, Update]]] = []
        self.gradients = Gradients()
        self.notes = Notes()  # what reduce_scatter_hook has summed
        # All parameters, trained or not; by their ids a number that is the same on all ranks; a digest of the layout.
        self.every: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.layout = 0
        self._agreed = self.every, self.numbers  # as of the last call in which the ranks met
        self.counts = StepCounts()
        self.imbalance = 1.0  # elements that the fullest rank updates, over the mean
        self._lengths: list[int] = []
        self._frozen: list[Tensor] = []
        self._places: tuple[list[Any], ...] = ()
        self._settings: list[tuple[Any, ...]] = []
        self._states: list[ParamState] = []
        self._state_seen: Any = None
        self._grads_seen: Any = None
        self._grad_places: Any = None  # of the last gradients
        self._last_places: Any = None  # of those of the last step
        self._grad_moves = 0  # how often they were elsewhere after they had been remembered
        self.with_gradients: list[int] = []  # the positions of parameters that have some
        # The updates of the last few kinds of gradients: which parameters had some, of which dtypes, strides, divisors.
        self._made: dict[Any, tuple[list[list[tuple[int, Update]]], list[tuple[Update, list[int]]]]] = {}
        # The updates, with the positions of their gradients among all that there are.
        self._sources: list[tuple[Update, list[int]]] = []
        self._scratch: dict[torch.device, Scratch] = {}

    def follow(self, for_step: bool = True) -> None:
        """Make the plan that of the optimizer as it is now; its states only for a step, as nothing else needs them.

        Raises:
            RuntimeError or ValueError: it cannot be followed. Neither parameters nor states have changed.
        """
        groups = self.optimizer.param_groups
        settings = [check_group(group, index) for index, group in enumerate(groups)]
        if not self._buckets_are_current(groups):
            self._lay_out_buckets(groups)
        elif for_step and not self._states_are_current(groups):
            self._take_states(self.storage.find_states(self.optimizer, self.params))
        if settings != self._settings:
            precision, pairs = self.storage.options.precision, zip(self._states, self.params, strict=True)
            try_groups(groups, {(state.group, precision(param).compute, param.device) for state, param in pairs})
            self._settings = settings
            self._forget_updates()
        grads = list(map(_grad_of, self.params))
        if not self._gradients_are_current(grads):
            self._take_gradients(grads, groups)
        for param, grad, reduced in self.notes.reduced:
            check_reduced(param, grad, reduced, self.storage.process_group, values=True)

    def accept_changes(self) -> None:
        """Take the gradients as they are now for what the hook wrote; for changes that all ranks make alike."""
        for grad, total in self.notes.sums.values():
            total.show(grad)
        for _, grad, reduced in self.notes.reduced:
            reduced.remember(grad)

    def accept(self, for_step: bool = True) -> None:
        """Keep new states and the order of parameters, to which all ranks have agreed now; states as in `follow`."""
        self._agreed = self.every, self.numbers
        if for_step and self._state_seen is None:
            self._store_states()

    # Layer 1: buckets

    def _buckets_are_current(self, groups: Groups) -> bool:
        every = list(chain.from_iterable(group["params"] for group in groups))
        return (
            identical(every, self.every)
            and [len(group["params"]) for group in groups] == self._lengths
            and not any(param.requires_grad or param.grad is not None for param in self._frozen)
            and places_of(self.params) == self._places
        )

    def _lay_out_buckets(self, groups: Groups) -> None:
        """Give every trained parameter a bucket. The result is the same on all ranks, as all see the same groups."""
        every = list(chain.from_iterable(group["params"] for group in groups))
        for index, group in enumerate(groups):
            check_supported(group, index)
            self.storage.options.check_blocks(group["params"], self.world_size)
        if len(set(map(id, every))) < len(every):
            raise ValueError("some parameters appear in more than one param group")
        # A parameter that was trained before keeps its place while it is frozen, as it may thaw again.
        before = set(map(id, self.params))
        params = [p for p in every if id(p) in before or p.requires_grad or p.grad is not None]
        states = self.storage.find_states(self.optimizer, params)
        trained = set(map(id, params))
        check_memory(groups, trained, self.world_size)
        transport = {p.device: self.transports.of(p.device) for p in params}
        cap_bytes = self.storage.options.bucket_cap_mb * 2**20
        buckets = make_buckets(params, self.rank, self.world_size, cap_bytes, lambda p: transport[p.device].rules)
        use_staging(buckets, lambda p: transport[p.device])
        self._lengths = [len(group["params"]) for group in groups]
        _, known = self._agreed
        new = itertools.count(1 + max(known.values(), default=-1))
        self.numbers = {id(p): known[id(p)] if id(p) in known else next(new) for p in every}
        mark_left([param for param in self.every if id(param) not in self.numbers], cast(Owner, self.optimizer))
        self.params, self.buckets, self.every = params, buckets, every
        kinds = [(self.numbers[id(p)], tuple(p.shape), p.stride(), p.dtype) for p in params]
        self.layout = digest_of((kinds, self._lengths))
        self._frozen = [param for param in every if id(param) not in trained]
        self._places = places_of(params)
        total = sum(bucket.total for bucket in buckets)
        self.imbalance = self.world_size * sum(bucket.fullest for bucket in buckets) / total if total else 1.0
        self._cuts = [shard_index(param.shape, self.world_size, self.rank) for param in params]
        self._settings = []  # as there may be parameters of other dtypes
        self._take_states(states)
        self.forget_others()

    # Layer 2: states

    def _states_are_current(self, groups: Groups) -> bool:
        if self._state_seen is None:
            return False
        keys, entries, names, values, amsgrad = self._state_seen
        state, mine = self.optimizer.state, [state.entry for state in self._states]
        if not identical(list(state), keys) or not identical(list(state.values()), entries):
            if not identical(list(map(state.get, self.params)), mine):
                return False
            self._state_seen = (list(state), list(state.values()), names, values, amsgrad)  # others' entries
        return (
            list(chain.from_iterable(mine)) == names
            and identical(list(chain.from_iterable(map(_items_of, mine))), values)
            and [group["amsgrad"] for group in groups] == amsgrad
        )

    def _take_states(self, states: list[ParamState]) -> None:
        self._states, self._state_seen = states, None
        self.counts = StepCounts([state.local["step"] for state in states])
        self._forget_updates()

    def _store_states(self) -> None:
        """Put new states and pieces into `optimizer.state`, now that nothing has been refused."""
        state, groups = self.optimizer.state, self.optimizer.param_groups
        for param, (_, entry, _, replaced) in zip(self.params, self._states, strict=True):
            entry.update(replaced)
            if not state.get(param):
                state[param] = entry
        mine = [state.entry for state in self._states]
        names, values = list(chain.from_iterable(mine)), list(chain.from_iterable(map(_items_of, mine)))
        amsgrad = [group["amsgrad"] for group in groups]
        self._state_seen = (list(state), list(state.values()), names, values, amsgrad)

    # Layer 3: gradients

    def _gradients_are_current(self, grads: Sequence[Tensor | None]) -> bool:
        if self._grads_seen is None:
            return False
        before, places, count = self._grads_seen
        return (
            count == changes()
            and identical(grads, before)
            and places_of([grad for grad in grads if grad is not None]) == places
        )

    def _take_gradients(self, grads: Sequence[Tensor | None], groups: Groups) -> None:
        """Look at new gradients, and lay out the updates anew unless these gradients are like those before."""
        before, self._grads_seen = self._grads_seen, None
        self.with_gradients = indices = [index for index, grad in enumerate(grads) if grad is not None]
        params, some = [self.params[index] for index in indices], [grad for grad in grads if grad is not None]
        check_gradients(params, some)
        group, ranks, dtype = self.storage.process_group, self.storage.ranks, self.storage.options.grad_dtype
        self.notes = find_notes(params, some, group, ranks, dtype)
        divisors, all_reduced = self.notes.divisors, self.notes.all_reduced
        pieces = some if self.world_size == 1 else [g[self._cuts[i]] for i, g in zip(indices, some, strict=True)]
        sums = {position: one.total for position, (_, one) in self.notes.sums.items()}
        if sums:
            pieces = [sums.get(position, piece) for position, piece in enumerate(pieces)]
        kinds = tuple(indices), tuple(map(dtype_of, pieces)), tuple(map(Tensor.stride, pieces)), tuple(divisors)
        if kinds in self._made:
            self.updates, sources = self._made[kinds]
            for update, members in sources:
                update.use([pieces[position] for position in members])
        else:
            self._make_updates(indices, pieces, divisors, groups)
            while len(self._made) >= MAX_UPDATES:
                del self._made[next(iter(self._made))]
            self._made[kinds] = (self.updates, self._sources)
        self._release_updates(kinds)
        known = [sums.get(position, grad) for position, grad in enumerate(some)] if sums else some
        self.gradients = Gradients(params, known, pieces, divisors, self.rank)
        # Gradients in DDP's buckets are remembered where two steps find them in the same places, from the third on,
        # as DDP lays its buckets out anew after the first. Without the hook they may be other views, which keep moving.
        # All others the user, or DDP, may want to free.
        places = places_of(some) if all_reduced or all(grad._base is not None for grad in some) else None
        if places is not None:
            self._grad_moves += not (all_reduced or before is None or before[1] == places)
            if places == self._last_places and (all_reduced or self._grad_moves <= 2):
                self._grads_seen = (list(grads), places, changes())
        self._grad_places = places

    def end_step(self) -> None:
        self._last_places = self._grad_places
        self.release_gradients()

    def release_gradients(self) -> None:
        """Let go of gradients that the user may want to free before the next step."""
        if self._grads_seen is None:
            self.gradients, self.notes = Gradients(), Notes()
            self._release_updates(None)

    def _release_updates(self, but: Any) -> None:
        for kinds, (_, sources) in self._made.items():
            for update, _ in sources if kinds != but else ():
                update.release()

    def _forget_updates(self) -> None:
        self._grads_seen = None
        self._made.clear()

    def _make_updates(
        self, indices: Sequence[int], pieces: Sequence[Tensor], divisors: Sequence[int], groups: Groups
    ) -> None:
        """Lay out the updates of the parameters at some indices, which have these pieces of gradients."""
        positions = {id(self.params[index]): position for position, index in enumerate(indices)}
        work: list[tuple[torch.device, dict[int, list[tuple[int, Piece]]]]] = []
        for bucket in self.buckets:
            of_groups: dict[int, list[tuple[int, Piece]]] = {}
            for param, own in zip(bucket.params, bucket.pieces, strict=True):
                if (position := positions.get(id(param))) is not None:
                    state, compute = self._states[indices[position]], self.storage.options.precision(param).compute
                    piece = Piece(own, pieces[position], divisors[position], state.local, compute)
                    of_groups.setdefault(state.group, []).append((position, piece))
            work.append((bucket.device, of_groups))
        for device, of_groups in work:
            sizes = [sum(piece.param.numel() for _, piece in some) for some in of_groups.values()]
            numel = scratch_numel(sizes, device)
            if device not in self._scratch or self._scratch[device].numel < numel:
                self._scratch[device] = Scratch(numel, device)
        self.updates, self._sources = [], []
        for device, of_groups in work:
            self.updates.append([])
            for group, some in of_groups.items():
                update = Update([piece for _, piece in some], groups[group], self._scratch[device])
                self.updates[-1].append((group, update))
                self._sources.append((update, [position for position, _ in some]))
