"""Adam and AdamW with their state cut across the ranks. Read `step` first."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join, Joinable, JoinHook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from zeroadam.agree import Manifest, check_ranks_agree, check_supported, describe_groups, joined_group
from zeroadam.bucket import IN_FLIGHT, Bucket, make_buckets, share_staging
from zeroadam.clip import clip_grad_norm_
from zeroadam.collectives import all_gather, is_gloo
from zeroadam.comm_hook import Reduction
from zeroadam.forward_gather import ForwardGather, Gather
from zeroadam.guard import mark_held, summed_over
from zeroadam.join import StepAlong, refuse_in_join
from zeroadam.precision import Precision, bitsandbytes, check_blocks, compute_dtype, precision
from zeroadam.report import Meter, StepReport
from zeroadam.shard import shard
from zeroadam.shared_memory import open_shared_memory
from zeroadam.state import choose_kernel, new_state
from zeroadam.state_dict import Kept, Loading, ShardedState, describe_state, empty_state, gather_state, prepare_loading
from zeroadam.update import STATE, Piece, update


class ZeroAdam(torch.optim.Adam, Joinable):
    """`torch.optim.Adam` that keeps 1/W of its state on each of W ranks: ZeRO stage 1 (arXiv:1910.02054).

    Every rank has all parameters p [d0, ...] and their averaged gradients, from DistributedDataParallel or otherwise,
    and owns a piece [c, ...] of each, c = ceil(d0 / W) (see `zeroadam.shard`). A step is

        update      exp_avg, exp_avg_sq, p   [c, ...]                 this rank's piece, by torch's own Adam
        all_gather  p                        [c, ...] -> [d0, ...]    the same parameters on every rank again

    bucket by bucket, each gather under way while the next bucket is updated. `state[p]` holds DTensors of the
    parameter's own shape, of which [c, ...] is on this rank, and p's `step` count.

    The numbers are those of `torch.optim.Adam`, bit for bit with `fused=False`. Where torch's own kernels round the
    last few elements of a run of memory unlike the rest, a cut moves that place: in fused ones, and in those for
    coupled weight decay on bfloat16 and float16.

    The arguments are those of `torch.optim.Adam`, but `fused` is the default wherever torch has such a kernel. Further
        process_group: the ranks over which the state is cut, all of them by default. As in DistributedDataParallel.
        bucket_cap_mb: megabytes (2^20 bytes) of parameters that are updated and gathered together. The memory
            for packing small parameters is at most three times this.
        master_dtype: torch.float32 for Adam to run on a float32 copy of bfloat16 and float16 parameters, which get the
            rounded result; see `zeroadam.master`. None, the default, for the numbers of torch's Adam on the same model.
        store_param_remainders: store of the copies of bfloat16 parameters only the 16 bits that these do not hold.
        state_dtype: torch.bfloat16 for moments in bfloat16, rounded stochastically; torch.uint8 for moments in 8 bits,
            wherever a parameter has rows of whole blocks, by bitsandbytes. Adam runs in float32 then; see
            `zeroadam.precision`. None, the default, for moments in the dtype in which Adam runs.

    Building the optimizer and `add_param_group` are collectives of the process group. Both raise on every rank:
        RuntimeError: ranks that disagree on parameters, their values or hyper-parameters; no process group.
        ValueError: no parameters, complex or already sharded ones, `differentiable=True`; what torch's Adam refuses;
            another `master_dtype` or `state_dtype`, or remainders without the first; 8-bit moments for another W than
            1 to 8, 16, 32 or 64 that would cut blocks, or without bitsandbytes.
    """

    def __init__(
        self,
        params: ParamsT,
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
    ) -> None:
        self.process_group = joined_group(process_group)
        self.rank, self.world_size = self.process_group.rank(), self.process_group.size()
        self.bucket_cap_mb = bucket_cap_mb
        self.master_dtype, self.store_param_remainders = master_dtype, store_param_remainders
        self.state_dtype = state_dtype
        self._meshes: dict[str, DeviceMesh] = {}

        def build() -> Manifest:
            if master_dtype not in (None, torch.float32):
                raise ValueError(f"master_dtype is torch.float32 or None, not {master_dtype}")
            if store_param_remainders and master_dtype is None:
                raise ValueError("store_param_remainders=True needs master_dtype=torch.float32")
            if state_dtype not in (None, torch.bfloat16, torch.uint8):
                raise ValueError(f"state_dtype is torch.bfloat16, torch.uint8 or None, not {state_dtype}")
            if state_dtype == torch.uint8:
                bitsandbytes()
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
            return {
                "master_dtype": str(master_dtype),
                "store_param_remainders": str(store_param_remainders),
                "state_dtype": str(state_dtype),
            } | describe_groups(self.param_groups, 0, self.defaults)

        check_ranks_agree(self.process_group, build)
        on_cpu = any(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        use_shared = on_cpu and self.world_size > 1 and is_gloo(self.process_group, "cpu")
        self.shared = open_shared_memory(self.process_group) if use_shared else None
        self._meter = Meter()
        self.reduction = Reduction(self.process_group, self.shared, self._meter)  # what reduce_scatter_hook works with
        Joinable.__init__(self)
        # Not even for the fused kernel: GradScaler is to unscale gradients itself and step only if they are finite.
        self._step_supports_amp_scaling = False
        self._whole_state: dict[Tensor, dict[str, Any]] | None = None  # after consolidate_state_dict, on one rank
        self._buckets: list[Bucket] = []
        self._gathers: dict[Tensor, Gather] = {}
        self._gathered_in_forward: set[Tensor] = set()
        self._hold(0)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. A collective of the process group.

        Args:
            closure: computes the loss and its gradients again and returns the loss.

        Raises:
            RuntimeError: a sparse gradient; a parameter cast or moved since the optimizer was built; gradients that
                something else has changed since `reduce_scatter_hook` summed them. Nothing has been changed then.
        """
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale  # type: ignore[attr-defined]
            raise RuntimeError(
                "torch.amp.GradScaler sees the infinities of this rank's gradients only, once reduce_scatter_hook has "
                "summed them: use zeroadam.GradScaler"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        Join.notify_join_context(self)
        self.finish_gather()  # of parameters that the forward has not used
        self._whole_state = None
        self._shard_new_parameters()
        for bucket in self._buckets:
            bucket.check()
        divisors = {p: summed_over(p, self.process_group) for bucket in self._buckets for p in bucket.params}
        unpacked: deque[Gather] = deque()
        for bucket in self._buckets:
            if bucket.packed and len(unpacked) == IN_FLIGHT:
                unpacked.popleft().finish()
            with self._meter.phase("update"):
                self._update(bucket, bucket.pack(), divisors)
            with self._meter.phase("all_gather"):
                gathers = self._gather(bucket)
            for gather in gathers:
                self._gathers.update(dict.fromkeys(gather.params, gather))
                if gather.unpack is not None:
                    unpacked.append(gather)
        for param in list(self._gathers):
            if param not in self._gathered_in_forward or self._shares_memory(param):
                self._gathers.pop(param).finish()
        self._meter.end_step(self._imbalance())
        return loss

    def _gather(self, bucket: Bucket) -> list[Gather]:
        """Start to gather what has been updated."""
        self._meter.count(*bucket.bytes_of_gather())
        unpack = bucket.unpack if bucket.packed else None
        if self.shared is not None and self._shares_memory(bucket.params[0]):
            return [Gather(bucket.params, self.shared.all_gather(bucket.rows()), unpack, self._meter)]
        gathers = []
        for index, rows in enumerate(bucket.rows()):
            params = bucket.direct[index : index + 1]
            wait = all_gather([rows], self.process_group)
            gathers.append(Gather(params or bucket.packed, wait, None if params else unpack, self._meter))
        return gathers

    def _shares_memory(self, param: Tensor) -> bool:
        """Whether it travels through shared memory, for which all ranks have to be at work."""
        return self.shared is not None and param.device.type == "cpu"

    def _imbalance(self) -> float:
        held = [sum(numels) for numels in zip(*(bucket.numels for bucket in self._buckets), strict=True)]
        return self.world_size * max(held) / max(sum(held), 1) if held else 1.0

    def report(self) -> StepReport:
        """What the last step cost on this rank: bytes sent and received, seconds, imbalance. No communication.

        Of the reductions only those by `reduce_scatter_hook` are seen, not DistributedDataParallel's own. Seconds are
        those of this process; on CUDA most of the work happens later, under the names zeroadam.update, .all_gather and
        .reduce_scatter in a trace of torch.profiler. Gathers that go on in the next forward count for the next step.
        """
        return self._meter.last

    def gather_in_forward(self, model: nn.Module) -> None:
        """Let the all-gather of `step()` go on during the next forward of `model`, for networks that are slow.

        Each module then waits before its forward for the parameters that it reads, and so do `model.state_dict()`,
        `model.load_state_dict()` and whatever of this optimizer needs them. Before anything else that reads or writes
        a parameter after `step()`, such as an average of the weights or `model.to()`, call `finish_gather()`; also
        before `destroy_process_group()`. Parameters of other models, and those that go through shared memory, are
        gathered in `step()` as ever.

        Raises:
            ValueError: the model has no parameter of this optimizer.
        """
        params = {param for group in self.param_groups for param in group["params"]} & set(model.parameters())
        if not params:
            raise ValueError("gather_in_forward() needs the model whose parameters this optimizer holds")
        self._gathered_in_forward |= params
        ForwardGather(self._gathers, self.finish_gather).watch(model)

    def finish_gather(self) -> None:
        """Wait until all parameters are on this rank. Needed after `gather_in_forward` only; see there."""
        with torch.no_grad():
            while self._gathers:
                self._gathers.pop(next(iter(self._gathers))).finish()

    def _update(self, bucket: Bucket, pieces: Sequence[Tensor], divisors: dict[Tensor, int]) -> None:
        """One step of torch's Adam, in place on `pieces` and their state, [c, ...] each, where there is a gradient."""
        with_grad: list[Piece] = []
        for param, piece in zip(bucket.params, pieces, strict=True):
            if param.grad is None:
                continue
            held = self.state[param]
            if piece.numel() == 0:  # another rank's, but its step counts here too
                held["step"] += 1
                continue
            own = {k: v.to_local() if isinstance(v, DTensor) else v for k, v in held.items() if k in STATE}
            grad = shard(param.grad, self.world_size, self.rank)
            with_grad.append(
                Piece(piece, grad, divisors[param], own, compute_dtype(param, self.master_dtype, self.state_dtype))
            )
        update(with_grad, self.param_groups[bucket.group_index])

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` over the mean gradients of all parameters, with or without the hook.

        A collective: one all-reduce of one or two numbers. Like torch's, it scales `p.grad` in place.

        Returns:
            the norm before clipping, [] float32, the same on every rank.

        Raises:
            RuntimeError: the norm is not finite and `error_if_nonfinite` is set; inside `Join`; or see `step`.
        """
        refuse_in_join(self, "clip_grad_norm_()")
        params = [param for group in self.param_groups for param in group["params"]]
        return clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, self.process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in `torch.optim.Optimizer`, also in the middle of training. A collective then.

        Raises like the constructor, and leaves the optimizer as it was.
        """
        if not hasattr(self, "_buckets"):  # torch's constructor adds its groups here; ours checks them all at once
            self._add_valid(param_group)
            return
        self.finish_gather()
        before = len(self.param_groups)

        def add() -> Manifest:
            self._add_valid(param_group)
            return describe_groups(self.param_groups, before, self.defaults)

        try:
            check_ranks_agree(self.process_group, add)
        except Exception:
            del self.param_groups[before:]
            raise
        self._whole_state = None
        self._hold(before)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `torch.distributed.algorithms.Join([model, optimizer])`; needs `reduce_scatter_hook`."""
        return StepAlong(self, **kwargs)

    @property
    def join_device(self) -> torch.device:
        return cast(Tensor, self.param_groups[0]["params"][0]).device

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        return self.process_group

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim.Optimizer`: the very tensors of this rank's state. No communication.

        For torch.distributed.checkpoint and `load_state_dict`. `torch.save` of it raises, as it would keep 1/W only.
        On the rank to which `consolidate_state_dict` has gathered the state, it is plain and whole until the next step.
        """
        own = self.state
        self.state = own if self._whole_state is None else defaultdict(dict, self._whole_state)
        try:
            state_dict = super().state_dict()
        finally:
            self.state = own
        if self._whole_state is None:
            state_dict["state"] = ShardedState(state_dict["state"])
        return state_dict

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state in the CPU memory of one rank, whose `state_dict()` a plain Adam loads. A collective.

        Until the next step, or until something is loaded or added. The other ranks need memory for a piece of one
        parameter more, rank `to` for the whole state on the CPU.

        Args:
            to: the rank in the process group.

        Raises:
            ValueError: there is no such rank.
            RuntimeError: rank `to` has too little memory; ranks that disagree on `to`; inside `Join`.
        """
        refuse_in_join(self, "consolidate_state_dict()")
        self.finish_gather()
        if not 0 <= to < self.world_size:
            raise ValueError(f"there is no rank {to} in a process group of {self.world_size}")
        whole: dict[Tensor, dict[str, Any]] | None = None

        def allocate() -> Manifest:
            nonlocal whole
            whole = empty_state(self) if self.rank == to else None
            return {"the rank to gather the state to": str(to), **describe_state(self)}

        self._whole_state = None
        check_ranks_agree(self.process_group, allocate)
        gather_state(self, whole, to)
        self._whole_state = whole

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
                loading = prepare_loading(self, adapted)
                return loading.manifest

            check_ranks_agree(self.process_group, prepare)
            assert loading is not None
            return loading.copy()

        self.finish_gather()
        hook = self.register_load_state_dict_pre_hook(take_over)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._whole_state = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        entries = {param: kept.entry if isinstance(kept, Kept) else kept for param, kept in state["state"].items()}
        super().__setstate__({**state, "state": defaultdict(dict, entries)})  # type: ignore[no-untyped-call]

    def __getstate__(self) -> NoReturn:
        raise RuntimeError(
            "a sharded optimizer cannot be pickled or copied, as a part of its state is on other ranks: "
            "build another one and load this one's state_dict()"
        )

    def _add_valid(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        check_supported(self.param_groups[-1], len(self.param_groups) - 1)
        if self.state_dtype == torch.uint8:
            check_blocks(self.param_groups[-1]["params"], self.world_size)
        choose_kernel(self.param_groups[-1])

    def _hold(self, first: int) -> None:
        """Take on the param groups from the `first`, which all ranks have agreed on."""
        for group in self.param_groups[first:]:
            mark_held(group["params"], self)
        self._shard_new_parameters()

    def _shard_new_parameters(self) -> None:
        """Give state and a bucket to parameters without: all at first, later those that were added or unfrozen."""
        held = {param for bucket in self._buckets for param in bucket.params}
        for index, group in enumerate(self.param_groups):
            new = [p for p in group["params"] if p not in held and (p.requires_grad or p.grad is not None)]
            self._fill_state(new, group)
            cap_bytes = self.bucket_cap_mb * 2**20
            self._buckets += make_buckets(new, index, self.rank, self.world_size, cap_bytes, self._equal_rows)
        if len(held) < sum(len(bucket.params) for bucket in self._buckets):
            share_staging(self._buckets)

    def _fill_state(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if param not in self.state:
                self.state[param] = new_state(param, group, self.mesh(param), self.precision(param))

    def _equal_rows(self, param: Tensor) -> bool:
        return not is_gloo(self.process_group, param.device.type)

    def precision(self, param: Tensor) -> Precision:
        """In what the state of a parameter is kept."""
        return precision(param, self.master_dtype, self.store_param_remainders, self.state_dtype)

    def mesh(self, param: Tensor) -> DeviceMesh:
        """The ranks of the process group, for DTensors where the parameter is."""
        kind = param.device.type
        if kind not in self._meshes:
            self._meshes[kind] = DeviceMesh.from_group(self.process_group, kind)
        return self._meshes[kind]


class ZeroAdamW(ZeroAdam):
    """`torch.optim.AdamW` that keeps 1/W of its state on each of W ranks. All else is as in `ZeroAdam`."""

    def __init__(
        self,
        params: ParamsT,
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
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # as in torch: also for dicts that were saved before it had this key
            group["decoupled_weight_decay"] = True
