"""Adam and AdamW with their state sharded over the ranks. Read `step` first.

More than 300 lines, as most of them are the signatures and docstrings of all that is public.
"""

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join, Joinable, JoinHook
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import ParamsT

from zeroadam._compat import disable_dynamo
from zeroadam.gather.gathers import Gathers
from zeroadam.gather.in_forward import warn_of_buffers, watch
from zeroadam.options import Options
from zeroadam.reduce.clip import all_finite, clip_grad_norm_, clip_grad_value_
from zeroadam.reduce.grad_scaler import refuse_torch_scaler
from zeroadam.reduce.hook import Hook, Reduction, params_of, reduce_scatter_hook, register_hook
from zeroadam.reduce.join import StepAlong, refuse_in_join
from zeroadam.reduce.ownership import accept_zeroing, forget_old, register
from zeroadam.report import Meter, StepReport
from zeroadam.state.agreement import (
    Manifest,
    check_process_group,
    check_rank,
    check_ranks_agree,
    check_supported,
    describe_groups,
    describe_step,
    describe_training,
    describe_values,
    digest_step,
    find_difference,
    joined_group,
)
from zeroadam.state.part import LEFT_OUT, PART, LeftOut, ShardedState, called_by_checkpoint
from zeroadam.state.state_dict import (
    Loaded,
    Loading,
    as_part,
    as_plain,
    describe_state,
    empty_state,
    gather_state,
    has_numbers,
    prepare_loading,
    without_the_untrained,
)
from zeroadam.state.storage import Storage, choose_kernel
from zeroadam.step_plan import StepPlan
from zeroadam.transport import Transports
from zeroadam.transport.calls import LOOK, STEP, DisagreementError, digest_of
from zeroadam.transport.hybrid import groups_of
from zeroadam.update.adam import prepare
from zeroadam.update.hyperparameters import refuse_capture


class ZeroAdam(torch.optim.Adam, Joinable):
    """`torch.optim.Adam` that shards its state over W ranks, 1/W on each: ZeRO stage 1 (arXiv:1910.02054).

    Every rank has all parameters p [d0, ...] and their averaged gradients, from DistributedDataParallel or otherwise,
    and owns a piece [c, ...] of each, c = ceil(d0 / W) (see `zeroadam.layout.shard`). A step is

        update      exp_avg, exp_avg_sq, p   [c, ...]                 this rank's piece, by torch's own Adam
        all_gather  p                        [c, ...] -> [d0, ...]    the same parameters on every rank again

    bucket by bucket, each gather under way while the next bucket is updated. `state[p]` holds DTensors of the
    parameter's own shape, of which [c, ...] is on this rank, and p's `step` count.

    The numbers are those of `torch.optim.Adam`, bit for bit with `fused=False`. Where torch's own kernels round the
    last few elements of a run of memory unlike the rest, sharding moves that place: in fused ones, and in those for
    coupled weight decay on bfloat16 and float16.

    The arguments are those of `torch.optim.Adam`, but `fused` is the default wherever torch has such a kernel, and
    params may be a model, for its `named_parameters()`.

    Building the optimizer and `add_param_group` are collectives of the process group. Parameters may have other values
    on other ranks until DistributedDataParallel makes them equal, before the first step.

    Args:
        process_group: the ranks over which the state is sharded, all by default. As in DistributedDataParallel.
            Without torchrun and `init_process_group()` there is one rank, and the state is that of torch's Adam.
        bucket_cap_mb: megabytes (2^20 bytes) of parameters that are updated and gathered together. The memory
            for packing small parameters is at most three times this, or three times the largest of them.
        master_dtype: torch.float32 for Adam to run on a float32 copy of bfloat16 and float16 parameters, which get the
            rounded result. None, the default, for the numbers of torch's Adam on the same model.
        store_param_remainders: store of the copies of bfloat16 parameters only the 16 bits that these do not hold.
        state_dtype: torch.bfloat16 for moments in bfloat16, rounded stochastically; torch.uint8 for moments in 8 bits,
            wherever a parameter has rows of whole blocks, by bitsandbytes. Adam runs in float32 then. None, the
            default, for moments in the dtype in which Adam runs.
        ordered_sums: for `reduce_scatter_hook` to add gradients up in rank order and in float32 also on NCCL, whose own
            order depends on W and where bfloat16 is rounded at every hop. On gloo it does so anyway, but for sums of
            bfloat16 and float16 of hosts with several ranks, which are rounded when they go to other hosts: with this
            they are not. On NCCL as many bytes are sent, by an all-to-all; on each rank three parts of a backward need
            as much memory again, of up to 40 MB.
        grad_dtype: torch.float32 to sum gradients of bfloat16 and float16 parameters in float32, over the ranks and all
            backwards of a step, on the rank that owns them: 4/W bytes per parameter. `p.grad` keeps its dtype and shows
            the sum rounded. It needs `reduce_scatter_hook` or `bf16_reduce_scatter_hook`, and implies `ordered_sums`.
            What accumulates in `no_sync()` does so in its own dtype. None, the default, for sums in that dtype.
        device_mesh: [R, S], as `init_device_mesh("cpu", (R, S), mesh_dim_names=("replicate", "shard"))`, of all ranks:
            state is sharded over S of them, `process_group` is these, and R such groups hold the same, as in FSDP2's
            hybrid sharding. With the hook each rank's piece of the sum is all-reduced between the groups in backward,
            and a gather stays within S ranks. DistributedDataParallel is on all ranks. On CPUs over gloo; no `Join`.
        hook: what to register as communication hook where params is a DistributedDataParallel model; None for nothing.
            Its `gradient_as_bucket_view` must be set, or a warning says that there is no hook.

    Raises:
        RuntimeError: ranks that disagree on parameters or hyper-parameters; several processes and no process group.
        ValueError: no parameters, complex or already sharded ones, `differentiable=True`; what torch's Adam refuses;
            another `master_dtype`, `state_dtype` or `grad_dtype`, or remainders without the first; 8-bit moments for
            another W than 1 to 8, 16, 32 or 64 that would cut blocks, or without bitsandbytes; a `bucket_cap_mb` that
            is not positive; a `process_group` that is none; a `device_mesh` that is not [R, S] of all ranks, or not
            over gloo.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float = 25,
        master_dtype: torch.dtype | None = None,
        store_param_remainders: bool = False,
        state_dtype: torch.dtype | None = None,
        ordered_sums: bool = False,
        grad_dtype: torch.dtype | None = None,
        device_mesh: DeviceMesh | None = None,
        hook: Hook | None = reduce_scatter_hook,
    ) -> None:
        model, params = params if isinstance(params, nn.Module) else None, params_of(params)
        groups = None if device_mesh is None else groups_of(device_mesh, process_group)
        if groups is not None:
            process_group = groups.shards
        elif process_group is None and isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        self.process_group = joined_group(process_group)
        self.all_ranks = self.process_group if groups is None else groups.everyone
        self.rank, self.world_size = self.process_group.rank(), self.process_group.size()
        self._difference: str | None = None  # between the values of parameters on the ranks
        self._stepped = False  # or loaded
        self._check_every = 0  # steps
        ordered_sums = ordered_sums or grad_dtype is not None
        options = Options(bucket_cap_mb, master_dtype, store_param_remainders, state_dtype, ordered_sums, grad_dtype)
        self._storage = Storage(self.process_group, options, device_mesh)

        def build() -> Manifest:
            check_process_group(process_group)
            options.check()
            options.check_installed()
            super(ZeroAdam, self).__init__(
                params,
                lr,
                betas,
                eps,
                weight_decay,
                amsgrad,
                foreach=foreach,
                maximize=maximize,
                capturable=capturable,
                differentiable=differentiable,
                fused=fused,
                decoupled_weight_decay=decoupled_weight_decay,
            )
            return options.describe() | describe_groups(self.param_groups, 0, self.defaults)

        check_ranks_agree(self.all_ranks, build, self._device)
        Joinable.__init__(self)
        self._prepare(Transports(self.process_group, ordered_sums, groups))
        self._plan.follow()
        self._plan.accept()
        self._plan.release_gradients()
        self._compare_values()
        if model is not None and hook is not None:
            register_hook(model, self, hook)

    def _compare_values(self) -> None:
        """See whether all ranks have the same parameters. They need not before DDP makes them so. A collective."""
        self._difference = find_difference(self.all_ranks, lambda: describe_values(self.param_groups), self._device)

    def _prepare(self, transports: Transports) -> None:
        """Make everything that is not torch's Adam, for the param groups and states that there are."""
        self._transports, self._meter = transports, Meter()
        in_float32 = self._storage.options.grad_dtype is not None
        # What reduce_scatter_hook works with.
        self.reduction = Reduction(self.process_group, transports, self._meter, in_float32)
        self._plan = StepPlan(self, self._storage, transports, self.reduction.forget_others)
        self._gathers = Gathers(self._meter)
        # Not even for the fused kernel: GradScaler is to unscale gradients itself and step only if they are finite.
        self._step_supports_amp_scaling = False
        # After consolidate_state_dict: the whole state on one rank, nothing on the others.
        self._consolidated: dict[Any, Any] | None = None
        register(self)
        forget_old(param for group in self.param_groups for param in group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. A collective of the process group.

        Args:
            closure: computes the loss and its gradients again and returns the loss.

        Raises:
            RuntimeError: parameters that are not alike on all ranks, where they were not when the optimizer was built;
                a sparse gradient; a parameter cast or moved since its state was made; gradients that something else
                has changed since `reduce_scatter_hook` summed them, or that it has not summed in `grad_dtype`; an entry
                of `state` that is missing or does not fit; ranks that differ in param groups or in which parameters
                have gradients; the capture of a CUDA graph without `capturable`.
            ValueError: param groups with which torch's Adam would fail or that cannot be sharded.
                Where ranks meet, see `zeroadam.transport`, all of these are raised on all ranks and change nothing.
            RuntimeError: ranks that are out of step, or one that has failed half-way; then nothing can go on.
        """
        refuse_torch_scaler(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # Phase 0: follow what the user has done to param_groups, state and gradients; refuse what cannot be followed.
        Join.notify_join_context(self)
        self._gathers.finish()  # of parameters that the forward has not used
        self._begin(STEP)
        self._consolidated, self._stepped = None, True
        with self._ends_together():
            # Phase 1, bucket by bucket: update this rank's pieces, launch their all-gather.
            with self._meter.phase("update"):
                prepare(self._plan.updates, self.param_groups)
            for bucket, updates in zip(self._plan.buckets, self._plan.updates, strict=True):
                self._gathers.free_staging(bucket)
                with self._meter.phase("update"):
                    bucket.pack()
                    for index, update in updates:
                        update.step(self.param_groups[index])
                self._gathers.start(bucket)
            # Phase 2: wait for the parameters that the next forward does not wait for.
            self._gathers.end_step()
        if self._storage.ranks > 1:
            self._plan.counts.count(self._plan.with_gradients)
        self._meter.end_step(self._plan.imbalance, sum(one.total.nbytes for _, one in self._plan.notes.sums.values()))
        self._plan.end_step()
        return loss

    def _begin(self, call: int, describe: Callable[[], str] = lambda: "step()") -> None:
        """Bring the plan up to date, and meet the other ranks in a call; raises as `step`, before any change.

        describe: gives the call with its arguments, which must be the same on all ranks; may refuse them.
        """
        if self._difference is not None:
            self._compare_values()
            if self._difference is not None:
                raise RuntimeError(self._difference)
        self._transports.begin(call)
        plan, training = self._plan, Manifest()
        try:
            plan.follow(for_step=call == STEP)
            if call == STEP:
                refuse_capture(self.param_groups)
            what = describe()
            if self._storage.ranks > 1:
                if call == STEP and self._check_every and self._transports.calls.numbers[STEP] % self._check_every == 0:
                    training = describe_training(self)
                steps = plan.counts.packed() if call == STEP else b""
                digest = digest_step(self, plan.layout, plan.with_gradients, steps)
                self._transports.calls.digest = digest ^ digest_of((training, what))
        except BaseException:
            self._transports.refuse()
            raise
        if training and not self._transports.can_meet:
            check_ranks_agree(self.all_ranks, lambda: training, self._device)
        try:
            with self._meter.phase("all_gather"):  # the wait for a slower rank, which would come with its rows
                self._transports.meet()
        except DisagreementError:  # on all ranks alike, so they can say what it is
            having = {id(plan.params[position]) for position in plan.with_gradients}
            often = {"the call": what, "how often check_agreement() compares": f"every {self._check_every} steps"}
            check_ranks_agree(
                self.all_ranks, lambda: often | describe_step(self, plan.numbers, having) | training, self._device
            )
            raise
        plan.accept(for_step=call == STEP)

    def _meet(self, what: str) -> None:
        """Meet the other ranks in a call that is neither backward nor step; raises if they are in another one."""
        self._transports.begin(LOOK)
        self._transports.calls.digest = digest_of(what)
        try:
            self._transports.meet()
        except DisagreementError:
            check_ranks_agree(self.all_ranks, lambda: {"the call": what}, self._device)
            raise

    @contextlib.contextmanager
    def _ends_together(self) -> Iterator[None]:
        """For what has to end on all ranks: an error on one of them ends it on the others as well."""
        try:
            yield
        except BaseException as error:
            self._transports.fail(error)
            raise

    def report(self) -> StepReport:
        """What the last step cost on this rank: bytes sent and received, seconds, imbalance. No communication.

        Of the reductions only those by `reduce_scatter_hook` are seen, not DistributedDataParallel's own. Seconds are
        those of this process; on CUDA most of the work happens later, under the names zeroadam.update, .all_gather and
        .reduce_scatter in a trace of torch.profiler. Gathers that go on in the next forward count for the next step.
        """
        return self._meter.last

    def check_agreement(self, every: int = 100) -> None:
        """Compare parameters, steps and hyper-parameters of all ranks before every Nth `step()`; 0 for never.

        For ranks that have drifted apart: another file was loaded, random numbers were not the same, memory has lost a
        bit. The step then raises on all ranks, before it changes anything, and names the first that differs and on
        which ranks. What a step gathers is the same again after it, so a fault in one rank's copy of a trained
        parameter is found only by the step that follows it: with `every=1`, or where it comes back each time. In a
        parameter that was always frozen, in steps and in hyper-parameters it stays, and is found within N steps.

        Raises:
            ValueError: `every` is negative.
        """
        if every < 0:
            raise ValueError(f"every is a number of steps, or 0 for never, not {every}")
        self._check_every = every

    def gather_in_forward(self, model: nn.Module) -> None:
        """Let the all-gather of `step()` go on during the next forward of `model`, for networks that are slow.

        Whoever reads a parameter through the model's modules then waits for it, such as `module.weight`,
        `model.parameters()` and `model.state_dict()`, and so does whatever of this optimizer needs it. Who holds the
        parameter itself since before calls `finish_gather()` first: a list of parameters, another model of which they
        are a part; also before `destroy_process_group()`. `model.zero_grad()` waits for all, `optimizer.zero_grad()`
        for none. Parameters of other models, and those that go through shared memory, are gathered in `step()`.

        Warns where DistributedDataParallel sends buffers before each forward, which on NCCL queue behind the gathers.

        Raises:
            ValueError: the model has no parameter of this optimizer.
        """
        params = {param for group in self.param_groups for param in group["params"]} & set(model.parameters())
        if not params:
            raise ValueError("gather_in_forward() needs the model whose parameters this optimizer holds")
        if self.world_size > 1 and any(self._transports.of(d).sums_on_device for d in {p.device for p in params}):
            warn_of_buffers(model)
        self._gathers.in_forward.update(dict.fromkeys(params, True))
        for bucket in self._plan.buckets:
            bucket.in_forward = None
        watch(model, self._gathers)

    def finish_gather(self) -> None:
        """Wait until all parameters are on this rank. Needed after `gather_in_forward` only; see there."""
        self._gathers.finish()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` over the mean gradients of all parameters, with or without the hook.

        A collective: one all-reduce of one or two numbers. Like torch's, it scales `p.grad` in place.

        Returns:
            the norm before clipping, [] float32, the same on every rank.

        Raises:
            RuntimeError: the norm is not finite and `error_if_nonfinite` is set; inside `Join`; or see `step`.
        """
        return clip_grad_norm_([self], max_norm, norm_type, error_if_nonfinite)

    def clip_grad_value_(self, clip_value: float) -> None:
        """`torch.nn.utils.clip_grad_value_` over the mean gradients, with or without the hook. A collective."""
        clip_grad_value_([self], clip_value)

    def grads_are_finite(self) -> bool:
        """Whether no gradient has an inf or a nan, the same answer on every rank, with or without the hook.

        For training loops that skip a step then: with the hook, `p.grad` shows it on one rank only. A collective: one
        all-reduce of a number, for which the host waits.

        Raises:
            RuntimeError: inside `Join`; or see `step`.
        """
        return all_finite(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in `torch.optim.Optimizer`. Gradients that it zeroes in place leave those of other optimizers valid."""
        params = [] if set_to_none else [param for group in self.param_groups for param in group["params"]]
        accept = accept_zeroing(params)
        super().zero_grad(set_to_none)
        accept()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in `torch.optim.Optimizer`, also in the middle of training. A collective then.

        Raises like the constructor, and leaves the optimizer as it was.
        """
        if not hasattr(self, "_plan"):  # torch's constructor adds its groups here; ours checks them all at once
            self._add_valid(param_group)
            return
        self._gathers.finish()
        self._meet("add_param_group()")
        before = len(self.param_groups)

        def add() -> Manifest:
            self._add_valid(param_group)
            self._plan.follow()
            self._plan.release_gradients()
            return describe_groups(self.param_groups, before, self.defaults)

        try:
            check_ranks_agree(self.all_ranks, add, self._device)
        except Exception:
            del self.param_groups[before:]
            raise
        self._plan.accept()
        self._compare_values()
        self._consolidated = None

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `torch.distributed.algorithms.Join([model, optimizer])`; needs `reduce_scatter_hook`."""
        return StepAlong(self, **kwargs)

    def _device(self) -> torch.device:
        """That of the first parameter, also where the constructor has failed before it had any."""
        every = (param.device for group in getattr(self, "param_groups", ()) for param in group["params"])
        return next(every, torch.device("cpu"))

    @property
    def join_device(self) -> torch.device:
        return self._device()

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        if self.all_ranks is not self.process_group:
            raise RuntimeError("device_mesh= is not for Join: give all ranks equally many batches")
        return self.process_group

    def state_dict(self, *, sharded: bool = False) -> dict[str, Any]:
        """As in `torch.optim.Optimizer`. No communication. On more than one rank it is

        - what torch's Adam has, before the first step: no state;
        - the whole state, plain, on the rank to which `consolidate_state_dict` has gathered it, until the next step;
        - the very tensors of this rank's state, for torch.distributed.checkpoint, which may call this itself, or with
          `sharded=True`: for `dcp.save` and `load_state_dict`, not for `torch.save`, which raises.

        Raises:
            RuntimeError: none of these. A file with 1/W of the state would replace one that was whole.
        """
        sharded = self.world_size > 1 and (sharded or called_by_checkpoint())
        own, whole = self.state, None if sharded else self._consolidated
        if self.world_size > 1 and whole is None and not sharded:
            if self._stepped or has_numbers(own):
                raise RuntimeError(PART)
            whole = {key: entry for key, entry in own.items() if not isinstance(key, Tensor)}
        part = sharded or isinstance(whole, ShardedState)

        # A hook, and the first one: hooks of the user may make something else of the dict.
        def mark(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return as_part(state_dict) if part else as_plain(state_dict)

        if whole is not None and not part:  # but for what was deleted since
            self.state = defaultdict(dict, {key: value for key, value in whole.items() if key in own})
        self.state = defaultdict(dict, without_the_untrained(self.state, self.param_groups))
        hook = self.register_state_dict_post_hook(mark, prepend=True)
        try:
            return super().state_dict()
        finally:
            self.state = own
            hook.remove()

    @torch.no_grad()
    def consolidate_state_dict(self, to: int | str = 0) -> None:
        """Gather the whole state in the CPU memory of one rank, whose `state_dict()` a plain Adam loads. A collective.

        Until the next step, or until something is loaded or added. The other ranks need memory for a piece of one
        parameter more, rank `to` for the whole state on the CPU.

        Args:
            to: the rank in the process group, or "all" where every rank saves, or reads, the whole. With `device_mesh`
                this is the rank of that place in each shard group.

        Raises:
            ValueError: there is no such rank.
            RuntimeError: rank `to` has too little memory; ranks that disagree on `to`; inside `Join`.
        """
        refuse_in_join(self, "consolidate_state_dict()")
        self._gathers.finish()
        self._meet("consolidate_state_dict()")
        targets = range(self.world_size) if to == "all" else [to]
        whole: dict[Any, Any] | None = None

        def allocate() -> Manifest:
            nonlocal whole
            for target in targets:
                check_rank(target, self.process_group)
            whole = empty_state(self, self._storage) if self.rank in targets else None
            return {"the rank to gather the state to": str(to), **describe_state(self)}

        self._consolidated = None
        check_ranks_agree(self.all_ranks, allocate, self._device)
        for target in map(int, targets):
            gather_state(self, self._storage, whole if self.rank == target else None, target)
        self._consolidated = ShardedState() if whole is None else whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another ZeroAdam of the same ranks or of a plain `torch.optim.Adam`. A collective.

        It is checked on every rank before any of it is copied, into the memory that the state has already. Of the
        dict's tensors, which may be mapped from a file, no more than this rank's pieces are read.

        Args:
            state_dict: with this rank's DTensors, or with full tensors [d0, ...], of which this rank keeps [c, ...].

        Raises:
            ValueError: it is of other parameters, shapes, dtypes, groups or ranks, or of another kind of optimizer.
            RuntimeError: on the other ranks then; or the ranks' dicts differ in steps or hyper-parameters.
                The optimizer is as it was.
        """

        # A hook, and the last one: hooks of the user may adapt the dict first.
        def take_over(_: torch.optim.Optimizer, adapted: dict[str, Any]) -> dict[str, Any]:
            loading: Loading | None = None

            def prepare() -> Manifest:
                nonlocal loading
                loading = prepare_loading(self, self._storage, adapted)
                return loading.manifest

            check_ranks_agree(self.all_ranks, prepare, self._device)
            assert loading is not None
            return loading.copy()

        self._gathers.finish()
        self._meet("load_state_dict()")
        hook = self.register_load_state_dict_pre_hook(take_over)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._consolidated, self._stepped = None, bool(state_dict["state"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        entries = {key: value.entry if isinstance(value, Loaded) else value for key, value in state["state"].items()}
        super().__setstate__({**state, "state": defaultdict(dict, entries)})  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """A pickled model has a hook, and the hook has its optimizer, which is left out: see `LeftOut`."""
        warnings.warn(LEFT_OUT, stacklevel=2)
        return LeftOut, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ZeroAdam":
        """A copy over the same process group, with copies of the parameters and of this rank's state."""
        self._gathers.finish()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.process_group, copied.rank, copied.world_size = self.process_group, self.rank, self.world_size
        copied.all_ranks = self.all_ranks
        copied._storage, copied._difference, copied._stepped = self._storage, self._difference, self._stepped
        copied._check_every = self._check_every
        Joinable.__init__(copied)
        # As torch's optimizers, which leave hooks behind.
        kept = {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}
        copied.__setstate__(copy.deepcopy(kept, memo))
        copied._prepare(self._transports)
        return copied

    def _add_valid(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        check_supported(self.param_groups[-1], len(self.param_groups) - 1)
        self._storage.options.check_blocks(self.param_groups[-1]["params"], self.world_size)
        choose_kernel(self.param_groups[-1])


class ZeroAdamW(ZeroAdam):
    """`torch.optim.AdamW` that shards its state over W ranks, 1/W on each. All else is as in `ZeroAdam`, below."""

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float = 25,
        master_dtype: torch.dtype | None = None,
        store_param_remainders: bool = False,
        state_dtype: torch.dtype | None = None,
        ordered_sums: bool = False,
        grad_dtype: torch.dtype | None = None,
        device_mesh: DeviceMesh | None = None,
        hook: Hook | None = reduce_scatter_hook,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            process_group=process_group,
            bucket_cap_mb=bucket_cap_mb,
            master_dtype=master_dtype,
            store_param_remainders=store_param_remainders,
            state_dtype=state_dtype,
            ordered_sums=ordered_sums,
            grad_dtype=grad_dtype,
            device_mesh=device_mesh,
            hook=hook,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # as in torch: also for dicts that were saved before it had this key
            group["decoupled_weight_decay"] = True
