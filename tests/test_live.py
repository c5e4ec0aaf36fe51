"""What a user does to `param_groups`, `state`, parameters and gradients counts at the next step, exactly as in torch.

Random programs of such changes, steps, saves and loads run on our optimizer and on torch.optim.AdamW, which is fed the
same mean gradients. Parameters and states are equal to the bit after every step. In bfloat16 with masters, the
reference is torch's AdamW on float32 copies; with 8-bit moments it is ours on a single rank.
"""

import copy
import gc
import io
import os
import re
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import at_most
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW, reduce_scatter_hook
from zeroadam.layout.rows import RowRules
from zeroadam.transport import Backend, shared_memory
from zeroadam.transport.gloo import Gloo

EXAMPLES = int(os.environ.get("ZEROADAM_TEST_PROGRAMS", "6"))
MODES = ("plain", "fresh gradients", "hook", "master", "8bit")
SHAPES = [(), (3,), (2, 6), (5, 4), (0, 3), (40, 8), (41, 8), (4, 3, 2)]
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6, "fused": False}


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


class Both:
    """Our optimizer and the reference, over parameters of their own, to which the same is done."""

    def __init__(self, mode: str) -> None:
        self.mode, self.count, self.rank, self.world_size = mode, 0, dist.get_rank(), dist.get_world_size()
        self.model: nn.Module | None = None
        self.modelled: list[nn.Parameter] = []
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = [self.new(index) for index in range(6)]
        self.unused = [self.new(index) for index in range(6, 9)]
        options: dict[str, Any] = {}
        if mode == "master":
            options = {"master_dtype": torch.float32}
        elif mode == "8bit":
            options = {"state_dtype": torch.uint8}
        cut = (2, 4)
        first, second, third = self.pairs[: cut[0]], self.pairs[cut[0] : cut[1]], self.pairs[cut[1] :]
        groups = [[{"params": [pair[i] for pair in some]} for some in (first, second, third)] for i in range(2)]
        for of_one in groups:
            of_one[1]["lr"], of_one[2]["weight_decay"] = 3e-2, 0.0
        self.ours = ZeroAdamW(groups[0], **ADAMW, **options, bucket_cap_mb=0.0005)
        if mode == "8bit":
            self.plain: Any = ZeroAdamW(groups[1], **ADAMW, **options, process_group=ALONE[0])
        else:
            self.plain = torch.optim.AdamW(groups[1], **ADAMW)

    def new(self, index: int) -> tuple[nn.Parameter, nn.Parameter]:
        generator = torch.Generator().manual_seed(index)
        value = torch.randn(SHAPES[index % len(SHAPES)], generator=generator)
        if self.mode == "8bit" and index % 2:
            value = torch.randn(64, 64, generator=generator)
        if self.mode == "master":
            value = value.bfloat16()
        return nn.Parameter(value), nn.Parameter(value.float())

    def pair(self, which: int) -> tuple[nn.Parameter, nn.Parameter]:
        return self.pairs[which % len(self.pairs)]

    def groups(self, which: int) -> tuple[dict[str, Any], dict[str, Any]]:
        index = which % len(self.ours.param_groups)
        return self.ours.param_groups[index], self.plain.param_groups[index]

    def place(self, pair: tuple[nn.Parameter, nn.Parameter]) -> tuple[int, int]:
        for g, group in enumerate(self.ours.param_groups):
            for i, param in enumerate(group["params"]):
                if param is pair[0]:
                    return g, i
        raise AssertionError

    def restart(self, pair: tuple[nn.Parameter, nn.Parameter]) -> None:
        """The reference's copy has been deleted with the state, and begins as the parameter."""
        if self.mode == "master":
            pair[1].data.copy_(pair[0].data)

    def suit_amsgrad(self, pair: tuple[nn.Parameter, nn.Parameter]) -> None:
        """Let a state without what amsgrad needs start anew, as torch has a KeyError then in the middle of a step."""
        if self.ours.param_groups[self.place(pair)[0]]["amsgrad"]:
            for optimizer, param in zip((self.ours, self.plain), pair, strict=True):
                optimizer.state.pop(param, None)
            self.restart(pair)

    # ---- what a user does ----

    def step(self, seed: int, without: int) -> None:
        generators = [torch.Generator().manual_seed(1000 * seed + r) for r in range(self.world_size)]
        factors: list[list[Tensor]] = []
        for index, (mine, _) in enumerate(self.pairs):
            drawn = [torch.randn(mine.shape, generator=g).to(mine.dtype).float() for g in generators]
            factors.append(drawn if without % 7 != index or self.mode == "hook" else [])
        if self.mode == "hook":
            self.backward(factors)
        for (mine, theirs), drawn in zip(self.pairs, factors, strict=True):
            if not drawn:
                mine.grad = theirs.grad = None
                continue
            total = drawn[0]
            for other in drawn[1:]:
                total = total + other
            mean = total / self.world_size
            if self.mode == "master":
                mean = mean.bfloat16().float()
            theirs.grad = mean.clone()
            if self.mode == "hook":
                continue
            if mine.grad is None or self.mode == "fresh gradients":
                mine.grad = mean.to(mine.dtype, copy=True)
            else:
                with torch.no_grad():
                    mine.grad.copy_(mean)
        self.ours.step()
        self.plain.step()
        if self.mode == "master":
            for (mine, theirs), drawn in zip(self.pairs, factors, strict=True):
                assert not drawn or torch.equal(mine, theirs.bfloat16())
        self.check()

    def backward(self, factors: list[list[Tensor]]) -> None:
        """Through DDP over the parameters there are now, whose gradients are the factors."""
        params = [mine for mine, _ in self.pairs]
        if len(params) != len(self.modelled) or any(a is not b for a, b in zip(params, self.modelled, strict=True)):
            self.modelled = params
            module = nn.Module()
            for index, param in enumerate(params):
                module.register_parameter(str(index), param)
            module.forward = lambda given: sum(  # type: ignore[method-assign]
                (p * f).sum() for p, f in zip(module.parameters(), given, strict=True)
            )
            self.model = DistributedDataParallel(module, gradient_as_bucket_view=True)
            self.model.register_comm_hook(self.ours, reduce_scatter_hook)
        self.ours.zero_grad()
        assert self.model is not None
        self.model([drawn[self.rank] for drawn in factors]).backward()

    def reverse_groups(self, *_: int) -> None:
        self.ours.param_groups.reverse()
        self.plain.param_groups.reverse()

    def move_param(self, which: int, to: int) -> None:
        pair = self.pair(which)
        g, i = self.place(pair)
        for optimizer in (self.ours, self.plain):
            param = optimizer.param_groups[g]["params"].pop(i)
            optimizer.param_groups[to % len(optimizer.param_groups)]["params"].append(param)
        self.suit_amsgrad(pair)

    def remove_param(self, which: int, keep_state: int) -> None:
        if len(self.pairs) < 3:
            return
        pair = self.pair(which)
        g, i = self.place(pair)
        for optimizer, param in zip((self.ours, self.plain), pair, strict=True):
            del optimizer.param_groups[g]["params"][i]
            if keep_state % 2:
                optimizer.state.pop(param, None)
        if keep_state % 2:
            self.restart(pair)
        self.pairs = [other for other in self.pairs if other is not pair]
        self.unused.append(pair)

    def add_group(self, which: int, lr: int) -> None:
        if self.unused:
            pair = self.unused.pop(which % len(self.unused))
            for optimizer, param in zip((self.ours, self.plain), pair, strict=True):
                optimizer.add_param_group({"params": [param], "lr": 1e-3 * (1 + lr % 5)})
            self.pairs.append(pair)

    def append_param(self, which: int, to: int) -> None:
        if self.unused:
            pair = self.unused.pop(which % len(self.unused))
            for group, param in zip(self.groups(to), pair, strict=True):
                group["params"].append(param)
            self.pairs.append(pair)
            self.suit_amsgrad(pair)

    def exchange_param(self, which: int, keep_state: int) -> None:
        """As for a vocabulary that grows, or a layer that is replaced."""
        old = self.pair(which)
        g, i = self.place(old)
        self.count += 1
        new = tuple(nn.Parameter(torch.randn_like(p)) for p in old)
        new[1].data.copy_(new[0].data.copy_(torch.full_like(old[0], 0.1 * self.count)))
        for optimizer, before, after in zip((self.ours, self.plain), old, new, strict=True):
            optimizer.param_groups[g]["params"][i] = after
            state = optimizer.state.pop(before, None)
            if keep_state % 2 and state and self.mode != "master":
                optimizer.state[after] = state
        self.pairs[which % len(self.pairs)] = new  # type: ignore[call-overload]

    def replace_group(self, which: int, _: int) -> None:
        index = which % len(self.ours.param_groups)
        for optimizer in (self.ours, self.plain):
            optimizer.param_groups[index] = {**optimizer.param_groups[index], "lr": 5e-3}

    def remove_group(self, which: int, _: int) -> None:
        if len(self.ours.param_groups) > 2 and len(self.pairs) > 4:
            mine, _ = self.groups(which)
            gone = [pair for pair in self.pairs if any(pair[0] is p for p in mine["params"])]
            self.pairs = [pair for pair in self.pairs if not any(pair is other for other in gone)]
            for optimizer in (self.ours, self.plain):
                optimizer.param_groups.pop(which % len(optimizer.param_groups))
            self.unused += gone

    def clear_state(self, how: int, which: int) -> None:
        if how % 3 == 0:
            self.ours.state.clear()
            self.plain.state.clear()
        elif how % 3 == 1:
            self.ours.state, self.plain.state = defaultdict(dict), defaultdict(dict)
        for pair in self.pairs if how % 3 < 2 else [self.pair(which)]:
            for optimizer, param in zip((self.ours, self.plain), pair, strict=True):
                optimizer.state.pop(param, None)
            self.restart(pair)
        if how % 3 < 2:
            for pair in self.unused:
                self.restart(pair)

    def replace_entries(self, which: int, how: int) -> None:
        """As frameworks do that move a state, or with a whole tensor in place of what there was."""
        if not self.plain.state.get(self.pair(which)[1]):
            return  # torch makes a state only with the first gradient
        for optimizer, param in zip((self.ours, self.plain), self.pair(which), strict=True):
            for key, value in list(optimizer.state.get(param, {}).items()):
                if how % 2 and key == "exp_avg" and self.mode != "8bit":
                    like = param.detach().float()
                    optimizer.state[param][key] = torch.full_like(like, 0.25)
                else:
                    optimizer.state[param][key] = value.clone()

    def change_state(self, which: int, how: int) -> None:
        if not self.plain.state.get(self.pair(which)[1]):
            return
        for optimizer, param in zip((self.ours, self.plain), self.pair(which), strict=True):
            state = optimizer.state.get(param)
            if state and how % 2:
                state["step"].add_(3)
            elif state and "exp_avg" in state:
                state["exp_avg"].mul_(0.5)

    def set_hyperparameter(self, which: int, what: int) -> None:
        changes: list[tuple[str, Any]] = [
            ("lr", 2e-2),
            ("lr", torch.tensor(1.5e-2)),
            ("betas", (0.8, 0.95)),
            ("eps", 1e-4),
            ("weight_decay", 0.2),
            ("maximize", True),
            ("maximize", False),
        ]
        key, value = changes[what % len(changes)]
        for group in self.groups(which):
            group[key] = copy.copy(value)

    def set_amsgrad(self, which: int, value: int) -> None:
        if self.mode == "8bit":
            return
        for optimizer, group in zip((self.ours, self.plain), self.groups(which), strict=True):
            group["amsgrad"] = bool(value % 2)
            for param in group["params"]:
                optimizer.state.pop(param, None)
        for pair in self.pairs:
            if any(pair[0] is param for param in self.groups(which)[0]["params"]):
                self.restart(pair)

    def foreign_entry(self, value: int, _: int) -> None:
        self.ours.state["mine"] = self.plain.state["mine"] = value

    def change_param(self, which: int, how: int) -> None:
        mine, theirs = self.pair(which)
        if self.mode == "master":
            return  # what a parameter is set to, its master becomes: see update/test_master.py
        for param in (mine, theirs):
            with torch.no_grad():
                if how % 2:
                    param.data = param.data * 0.5
                else:
                    param.mul_(0.5)

    def freeze(self, which: int, value: int) -> None:
        if self.mode != "hook":  # DDP wants to know what is trained when it is built
            for param in self.pair(which):
                param.requires_grad_(bool(value % 2))

    def save_and_load(self, how: int, _: int) -> None:
        if any(isinstance(p, Tensor) and not any(p is m for m, _ in self.pairs) for p in self.ours.state):
            return  # torch's state_dict() has a KeyError then
        if self.mode in ("plain", "fresh gradients", "hook") and how % 3 == 0:
            self.ours.load_state_dict(copy.deepcopy(self.plain.state_dict()))
        elif how % 3 == 1:
            self.ours.load_state_dict(self.ours.state_dict(sharded=True))
        else:
            saved = copy.deepcopy(self.ours.state_dict(sharded=True))
            self.ours.load_state_dict(saved)
        self.plain.load_state_dict(copy.deepcopy(self.plain.state_dict()))

    def clip(self, seed: int, _: int) -> None:
        """Nothing but a look at gradients, if they are small enough."""
        self.ours.clip_grad_norm_(1e6 + seed)

    def check(self) -> None:
        for mine, theirs in self.pairs:
            assert torch.equal(mine, theirs.to(mine.dtype)), f"a parameter of shape {tuple(mine.shape)}"
            expected = self.plain.state.get(theirs, {})
            for key, value in expected.items():
                assert torch.equal(full(self.ours.state[mine][key]), full(value)), f"{key} of shape {tuple(mine.shape)}"
        assert self.ours.state.get("mine") == self.plain.state.get("mine")


ALONE: list[dist.ProcessGroup] = []
OPERATIONS = [name for name in vars(Both) if not name.startswith("_")]
for helper in ("new", "pair", "groups", "place", "restart", "suit_amsgrad", "backward", "check"):
    OPERATIONS.remove(helper)
Program = list[tuple[str, int, int]]
PROGRAMS = st.lists(
    st.tuples(
        st.sampled_from([name for name in OPERATIONS if name != "step"] + ["step"] * 6),
        st.integers(0, 20),
        st.integers(0, 20),
    ),
    max_size=14,
)


def run(mode: str, program: Program) -> None:
    both = Both(mode)
    for name, *arguments in [("step", 0, 9), *program, ("step", 99, 9)]:
        getattr(both, name)(*arguments)
    dist.barrier()


def run_all(mode: str, examples: int) -> None:
    """Rank 0 makes the programs up, and learns how they ended on every rank, so that it can shrink them."""
    for cls in (Gloo, shared_memory.SharedMemory, Backend):
        cls.rules = RowRules(
            cls.rules.equal, 512, 1024
        )  # so that small parameters travel directly as well, and in unequal rows
    ALONE[:] = [dist.new_group([rank], use_local_synchronization=True) for rank in [dist.get_rank()]]

    def everywhere(program: Program) -> None:
        dist.broadcast_object_list([program])
        attempt(program)

    def attempt(program: Program) -> None:
        error = None
        try:
            run(mode, program)
        except Exception as caught:
            error = caught
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if error is None else f"{type(error).__name__}: {error}")
        if dist.get_rank() == 0 and error is not None:
            raise error
        assert dist.get_rank() > 0 or not any(failures), failures

    if dist.get_rank() > 0:
        received: list[Any] = [None]
        dist.broadcast_object_list(received)
        while received[0] is not None:
            attempt(received[0])
            dist.broadcast_object_list(received)
        return
    checks = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    try:
        checks(given(PROGRAMS)(everywhere))()
    finally:
        dist.broadcast_object_list([None])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_random_programs_end_as_with_torch(run_ranks: Any, mode: str, world_size: int) -> None:
    run_ranks(run_all, world_size, mode, EXAMPLES, timeout=at_most(200 + EXAMPLES))


@pytest.mark.parametrize("transport", ["sockets", "late backend"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_random_programs_on_other_transports(run_ranks: Any, mode: str, transport: str) -> None:
    run_ranks(run_all, 2, mode, EXAMPLES, timeout=at_most(200 + EXAMPLES), transport=transport)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.slow
def test_random_programs_on_the_code_path_of_nccl(run_ranks: Any, world_size: int) -> None:
    """Without the hook, as the backend's sums of three and more are in an order of its own."""
    run_ranks(run_all, world_size, "plain", EXAMPLES, timeout=at_most(200 + EXAMPLES), transport="late backend")


def exchanged(hook: bool) -> None:
    """A vocabulary that grows: the old parameter is no longer trained, gathered, kept in memory, or paid for."""
    net = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 8))
    optimizer = ZeroAdamW(net.parameters(), lr=0.1)
    gone, sent = [], []
    for words in (200, 200, 200, 200):
        old = net[0].weight
        net[0] = nn.Embedding(words, 64)
        for param in net.parameters():
            dist.broadcast(param.data, 0)
        optimizer.param_groups[0]["params"][0] = net[0].weight
        optimizer.state.pop(old, None)
        gone.append(weakref.ref(old))
        del old
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        if hook:
            model.register_comm_hook(optimizer, reduce_scatter_hook)
        for _ in range(3):
            before = net[0].weight.detach().clone()
            model(torch.arange(words)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(net[0].weight, before)
        sent.append(optimizer.report().sent)
        del model, param
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert len(optimizer.state) == 3
    assert len(set(sent)) == 1
    assert optimizer.reduction.held_bytes() <= 2 * sum(param.nbytes for param in net.parameters())


@pytest.mark.parametrize("hook", [False, True])
def test_nothing_stays_of_a_parameter_that_was_exchanged(run_ranks: Any, hook: bool) -> None:
    run_ranks(exchanged, 2, hook)


def set_group(key: str, value: Any) -> Callable[[ZeroAdamW], Any]:
    return lambda optimizer: optimizer.param_groups[1].update({key: value})


def set_state(key: str, change: Callable[[Any], Any]) -> Callable[[ZeroAdamW], Any]:
    def edit(optimizer: ZeroAdamW) -> None:
        state = optimizer.state[optimizer.param_groups[1]["params"][1]]
        state[key] = change(state.get(key))

    return edit


REFUSED: dict[str, tuple[Callable[[ZeroAdamW], Any], str]] = {
    "no lr": (lambda o: o.param_groups[1].pop("lr"), "param group 1 has no 'lr'"),
    "only params": (lambda o: o.param_groups.append({"params": []}), "param group 2 has no 'lr'"),
    "text": (set_group("eps", "x"), "eps of param group 1 is 'x', not a number"),
    "one beta": (set_group("betas", (0.9,)), "not two numbers"),
    "no betas": (set_group("betas", 0.9), "not two numbers"),
    "a complex rate": (set_group("lr", torch.tensor(1j)), "lr of param group 1 is .*, not a number"),
    "a rate without a value": (set_group("lr", torch.ones((), device="meta")), "lr of param group 1 is .*, not a num"),
    "expanded": (
        lambda o: setattr(o.param_groups[1]["params"][1], "data", torch.ones(5).expand(7, 5)),
        "parameter 1 of group 1 is expanded",
    ),
    "two rates": (set_group("lr", torch.ones(2)), "not a number"),
    "differentiable": (set_group("differentiable", True), "differentiable=True is not supported"),
    "capturable": (
        lambda o: o.param_groups[1].update(capturable=True, fused=False),
        "torch's Adam refuses param group 1: If capturable=True",
    ),
    "foreach, tensor": (
        lambda o: o.param_groups[1].update(foreach=True, fused=False, lr=torch.tensor(0.1)),
        "torch's Adam refuses param group 1: lr as a Tensor is not supported",
    ),
    "twice": (
        lambda o: o.param_groups[1]["params"].append(o.param_groups[0]["params"][0]),
        "some parameters appear in more than one param group",
    ),
    "twice in one": (
        lambda o: o.param_groups[1]["params"].append(o.param_groups[1]["params"][0]),
        "group 1 holds a parameter twice",
    ),
    "complex": (
        lambda o: o.param_groups[1]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.complex64))),
        "parameter 2 of group 1 is complex",
    ),
    "meta": (
        lambda o: o.param_groups[1]["params"].append(nn.Parameter(torch.ones(2, device="meta"))),
        "parameter 2 of group 1 is on the meta device",
    ),
    "sparse": (
        lambda o: o.param_groups[1]["params"].append(nn.Parameter(torch.ones(2, 2).to_sparse())),
        "parameter 2 of group 1 is sparse",
    ),
    "amsgrad": (set_group("amsgrad", True), "max_exp_avg_sq in the state of parameter 0 of group 1 is missing"),
    "half a state": (
        lambda o: o.state[o.param_groups[1]["params"][1]].pop("exp_avg"),
        "exp_avg in the state of parameter 1 of group 1 is missing",
    ),
    "a step that is none": (set_state("step", float), "step in the state of parameter 1 of group 1 is a float"),
    "a state cast": (set_state("exp_avg", lambda t: t.bfloat16()), "exp_avg in the state of parameter 1 of group 1"),
    "a state of another shape": (set_state("exp_avg", lambda _: torch.ones(3)), "exp_avg in the state of parameter 1"),
    "a beta of one": (set_group("betas", (1.0, 0.999)), "torch's Adam refuses param group 1: float division by zero"),
    "a count that is none": (set_state("step", lambda _: torch.tensor(3)), "give it one floating-point number"),
    "codes beside moments": (
        set_state("exp_avg_8bit", lambda _: torch.ones(7, 5)),
        "exp_avg_8bit .* would not be used",
    ),
    "a gradient of another shape": (
        lambda o: setattr(o.param_groups[1]["params"][1].grad, "data", torch.ones(2, 5)),
        "has a gradient of shape",
    ),
    "a number in place of a parameter": (
        lambda o: o.param_groups[1]["params"].append(3),
        "parameter 2 of group 1 is a int, not a tensor",
    ),
    "a generator": (set_group("params", iter([])), "params of param group 1 is a list_iterator, not a list"),
    "a parameter cut short": (
        lambda o: setattr(o.param_groups[1]["params"][1], "data", torch.ones(6, 5)),
        "exp_avg in the state of parameter 1 of group 1 has shape",
    ),
    "two numbers": (set_group("lr", np.array([0.1, 0.2])), r"lr of param group 1 is array\(.*, not a number"),
    "no float": (set_group("eps", 10**400), "eps of param group 1 is 1000*, not a number"),
    "a step of two": (
        lambda o: set_state("step", lambda _: o.state[o.param_groups[0]["params"][1]]["step"])(o),
        "the step of parameter 1 of group 1 is the same tensor as that of parameter 1 of group 0",
    ),
    "a sparse gradient": (
        lambda o: setattr(o.param_groups[1]["params"][1], "grad", torch.ones(7, 5).to_sparse()),
        "has a sparse gradient",
    ),
}


def refused() -> None:
    for name, (edit, message) in REFUSED.items():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in [(4, 2), (), (6,), (7, 5)]]
        optimizer = ZeroAdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, fused=False)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        edit(optimizer)
        before = [param.detach().clone() for param in params]
        states = [{key: full(value) for key, value in optimizer.state[param].items()} for param in params]
        states = copy.deepcopy(states)
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError)) as raised:
                optimizer.step()
            assert re.search(message, str(raised.value)), name
        assert all(torch.equal(param, b) for param, b in zip(params, before, strict=True)), name
        for param, state in zip(params, states, strict=True):
            for key, value in state.items():
                now = full(optimizer.state[param][key])
                assert now == value if isinstance(value, float) else torch.equal(now, value), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_cannot_be_followed_is_refused_before_anything_changes(run_ranks: Any, world_size: int) -> None:
    """Nothing in parameters or states is another, not even a count of steps; the same at the second try."""
    run_ranks(refused, world_size)


def copied() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 5), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model.parameters(), lr=0.1)
    model.register_comm_hook(optimizer, reduce_scatter_hook)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        for _ in range(3):
            model(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [param.detach().clone() for param in model.parameters()]

    train(model, optimizer)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    other_model, other = copy.deepcopy((model, optimizer))
    assert all(a is not b for a, b in zip(other_model.parameters(), model.parameters(), strict=True))
    other_model.register_comm_hook(other, reduce_scatter_hook)
    mine = train(model, optimizer)
    theirs = train(other_model, other)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert set(other.state) == set(other_model.parameters())


def test_a_model_with_the_hook_and_its_optimizer_can_be_copied(run_ranks: Any) -> None:
    """The copies train as the originals do, and apart from them."""
    run_ranks(copied, 2)


def alone() -> None:
    params, others = ([nn.Parameter(torch.arange(12.0).view(3, 4)), nn.Parameter(torch.ones(()))] for _ in range(2))
    optimizer = ZeroAdamW(params, lr=0.1, fused=False)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    plain = torch.optim.AdamW(others, lr=0.5, fused=False)
    plain.load_state_dict(torch.load(file)["optimizer"])
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
        other.grad = torch.ones_like(param)
    optimizer.step()
    plain.step()
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))
    optimizer.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())


def test_one_process_saves_its_state_dict_as_torch_does(run_ranks: Any) -> None:
    """Nothing is elsewhere, so nothing has to be gathered, and torch.optim.AdamW loads what was saved."""
    run_ranks(alone, 1)


def freed(flat: bool) -> None:
    params = [nn.Parameter(torch.ones(40, 8)), nn.Parameter(torch.ones(3))]

    def set_gradients() -> list[Any]:
        buffer = torch.ones(323)
        for param, part in zip(params, buffer.split([320, 3]), strict=True):
            param.grad = part.view_as(param) if flat else torch.ones_like(param)
        gradients = [param.grad for param in params]
        return [weakref.ref(held) for grad in gradients for held in (grad, grad.untyped_storage())]

    def held(references: list[Any]) -> bool:
        return any(reference() is not None for reference in references)

    references = set_gradients()
    optimizer = ZeroAdamW(params[:1])
    optimizer.zero_grad()
    params[1].grad = None
    assert not held(references)  # those that were there before the optimizer
    references = set_gradients()
    optimizer.add_param_group({"params": params[1:]})
    optimizer.zero_grad()
    assert not held(references)
    at_once = []
    for _ in range(20):
        references = set_gradients()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        at_once.append(not held(references))
    # Views that come to lie where they lay before look like DDP's, which stay; once they do not, that is known.
    assert at_once.count(False) <= (3 if flat else 0)
    assert all(at_once[14:])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_that_the_user_lets_go_are_freed(run_ranks: Any, world_size: int, flat: bool) -> None:
    """zero_grad() frees their memory before the next backward needs it again."""
    run_ranks(freed, world_size, flat)


def first_buckets(hook: bool) -> None:
    """Whether those that DDP had in the first backward are freed before it has others."""
    for clips in (False, True):
        net = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
        model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.5)
        optimizer = ZeroAdamW(model, hook=reduce_scatter_hook if hook else None)
        references: list[Any] = []
        for step in range(4):
            loss = model(torch.ones(2, 300)).sum()
            if step == 1:  # DDP has laid out its buckets anew in this forward
                assert all(reference() is None for reference in references)
            loss.backward()
            references = [weakref.ref(param.grad.untyped_storage()) for param in net.parameters()]
            if clips:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss


@pytest.mark.parametrize("hook", [False, True])
def test_the_first_buckets_of_ddp_are_freed(run_ranks: Any, hook: bool) -> None:
    """Or all gradients would be in memory twice, in the second step."""
    run_ranks(first_buckets, 2, hook)


def shared_memory_of_parameters() -> None:
    whole = torch.randn(64, 64)
    ties: dict[str, tuple[Tensor, Tensor]] = {
        "the same": (whole, whole),
        "transposed": (whole, whole.t()),
        "overlapping": (whole[:40], whole[30:]),
        "columns": (whole[:, :40], whole[:, 39:]),
        "another dtype": (whole[:8], whole[7].view(torch.bfloat16)),
    }
    for name, tie in ties.items():
        one, other = map(nn.Parameter, tie)
        with pytest.raises(ValueError, match="parameter 0 of group 0 and parameter 2 of group 0 share memory"):
            ZeroAdamW([one, nn.Parameter(torch.ones(3)), other])
        assert name
        frozen = nn.Parameter(tie[1], requires_grad=False)
        ZeroAdamW([one, frozen])  # an average, a tied head that is not trained
    optimizer = ZeroAdamW([nn.Parameter(whole), one := nn.Parameter(torch.ones(64, 64))])
    one.data = whole
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    before = whole.clone()
    with pytest.raises(ValueError, match="share memory, and each would undo the update"):
        optimizer.step()
    assert torch.equal(whole, before)


def test_parameters_that_share_memory_are_refused(run_ranks: Any) -> None:
    """On more than one rank, where both would be updated from the same old value."""
    run_ranks(shared_memory_of_parameters, 2)


def interleaved() -> None:
    results = []
    for cls in (ZeroAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        whole = torch.randn(64, 64)
        params = [nn.Parameter(whole[:, :40]), nn.Parameter(whole[:, 40:])]
        optimizer = cls(params, **ADAMW)
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, step + 1.0)
            optimizer.step()
        results.append(whole)
    assert torch.equal(*results)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_may_be_interleaved_in_memory(run_ranks: Any, world_size: int) -> None:
    run_ranks(interleaved, world_size)


def amsgrad_at_last() -> None:
    results = []
    for cls in (ZeroAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(3))]
        optimizer = cls(params, **ADAMW)
        optimizer.param_groups[0]["amsgrad"] = True
        for step in range(4):
            for param in params:
                param.grad = torch.full_like(param, (-1.0) ** step / (step + 1))
            optimizer.step()
        results.append([param.detach() for param in params])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("world_size", [1, 2])
def test_amsgrad_may_be_set_before_the_first_step(run_ranks: Any, world_size: int) -> None:
    run_ranks(amsgrad_at_last, world_size)


def swapped() -> None:
    net = nn.Linear(4, 4)
    optimizer = ZeroAdamW(net.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    net.load_state_dict({key: torch.full_like(value, 3.0) for key, value in net.state_dict().items()})
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert 2.9 < float(net.weight[0, 0]) < 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_torch_may_swap_the_tensors_of_parameters(run_ranks: Any, world_size: int) -> None:
    """Which it does not for tensors with weak references."""
    run_ranks(swapped, world_size)


def reshaped() -> None:
    """Parameters in a buffer of their own, of which they take more or fewer rows, or another memory format."""
    results: list[list[Tensor]] = []
    for cls in (ZeroAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        buffer = torch.randn(8, 4)
        rows, image = nn.Parameter(buffer[:8]), nn.Parameter(torch.randn(5, 5, 3, 3))
        optimizer = cls([rows, image], **ADAMW)
        seen = []
        for step, count in enumerate((8, 8, 5, 5, 7, 8)):
            if rows.shape[0] != count:
                rows.grad = None
                rows.data = buffer[:count]
                del optimizer.state[rows]
            if step == 3:
                image.grad = None
                image.data = image.data.to(memory_format=torch.channels_last)
            for param in (rows, image):
                param.grad = torch.full_like(param, step + 1.0)
            optimizer.step()
            seen += [buffer.clone(), image.detach().clone()]
        results.append(seen)
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parameters_may_change_their_shape_and_memory_format(run_ranks: Any, world_size: int) -> None:
    """A rank that owns nothing of a parameter follows as well, and rows that were cut off are trained no more."""
    run_ranks(reshaped, world_size)


def not_added() -> None:
    optimizer = ZeroAdamW([nn.Parameter(torch.ones(4, 4))])
    for key, value in (("foreach", True), ("eps", "x"), ("lr", "x")):
        group = {"params": [nn.Parameter(torch.ones(3))], "lr": torch.tensor(0.1), "fused": False, key: value}
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == len(optimizer.state) == 1
        optimizer.state_dict()


def test_a_group_that_is_refused_leaves_nothing(run_ranks: Any) -> None:
    run_ranks(not_added, 2)


def taken_out(after: int) -> None:
    """DDP goes on reducing a parameter that no group has any more; later it comes back."""
    results = []
    for cls in (ZeroAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        optimizer = cls(model.parameters(), **ADAMW)
        if cls is ZeroAdamW:
            model.register_comm_hook(optimizer, reduce_scatter_hook)
        params = optimizer.param_groups[0]["params"]
        taken = params[1]
        for step in range(8):
            if step == after:
                del params[1]
            if step == after + 3:
                params.append(taken)
            torch.manual_seed(10 * step + dist.get_rank())
            model(torch.randn(3, 6)).square().sum().backward()
            optimizer.step()
            model.zero_grad()
        results.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_parameter_is_taken_out_of_its_group_and_not_out_of_the_model(run_ranks: Any, after: int) -> None:
    run_ranks(taken_out, 2, after)


def taken_over_after_a_refusal() -> None:
    """What replaces a state after a refused call counts, although clipping, which looks at no states, comes first."""
    torch.manual_seed(0)
    params, plain = ([nn.Parameter(torch.ones(shape)) for shape in [(6, 4), (5,), ()]] for _ in range(2))
    ours = ZeroAdamW(params, lr=0.1, fused=False)
    adamw = torch.optim.AdamW(plain, lr=0.1, fused=False)
    saved: Any = None
    for iteration in range(8):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.full_like(p, 1.0 + iteration)
            q.grad = p.grad.clone()
        if iteration == 2:
            saved = copy.deepcopy(adamw.state_dict())
        if iteration in (4, 6):
            for optimizer in (ours, adamw):
                optimizer.state.clear()
            group, lr = ours.param_groups[0], ours.param_groups[0]["lr"]
            group["lr"] = lr + dist.get_rank()
            with pytest.raises(RuntimeError, match="disagree on lr"):
                ours.step()
            group["lr"] = lr
            if iteration == 4:
                for optimizer in (ours, adamw):
                    optimizer.load_state_dict(saved)
            else:
                for optimizer, of in ((ours, params), (adamw, plain)):
                    for p in of:
                        optimizer.state[p] = {key: torch.full_like(p, 0.5) for key in ("exp_avg", "exp_avg_sq")}
                        optimizer.state[p]["step"] = torch.tensor(3.0)
        ours.clip_grad_value_(1e9)
        assert ours.grads_are_finite()
        ours.step()
        adamw.step()
        for p, q in zip(params, plain, strict=True):
            assert torch.equal(p, q), iteration
            assert ours.state[p]["step"] == adamw.state[q]["step"], iteration
            assert torch.equal(full(ours.state[p]["exp_avg"]), adamw.state[q]["exp_avg"]), iteration


def test_a_state_that_comes_between_a_refused_step_and_clipping_counts(run_ranks: Any) -> None:
    run_ranks(taken_over_after_a_refusal, 2)


def other_steps() -> None:
    """Counts of another shape and dtype, which torch takes as well."""
    params, plain = ([nn.Parameter(torch.ones(5, 3)) for _ in range(3)] for _ in range(2))
    ours, adamw = (ZeroAdamW(params, lr=0.1, fused=False), torch.optim.AdamW(plain, lr=0.1, fused=False))
    for iteration in range(4):
        for p in (*params, *plain):
            p.grad = torch.full_like(p, 1.0 + iteration)
        if iteration == 2:
            for optimizer, of in ((ours, params), (adamw, plain)):
                optimizer.state[of[0]]["step"] = torch.tensor([7.0])
                optimizer.state[of[1]]["step"] = torch.tensor(9.0, dtype=torch.float64)
        ours.step()
        adamw.step()
        assert all(map(torch.equal, params, plain)), iteration


def test_counts_of_steps_may_have_another_shape(run_ranks: Any) -> None:
    run_ranks(other_steps, 2)
