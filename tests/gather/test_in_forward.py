"""gather_in_forward: whoever reads a parameter reads the new one, and no sooner waits for it than that.

The gathers of these tests come late: nothing arrives before it is waited for, and until then the other ranks' pieces
are NaN.
"""

import copy
import io
import os
import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from zeroadam import ZeroAdamW, reduce_scatter_hook
from zeroadam.gather import param_bucket
from zeroadam.gather.gathers import Gathers
from zeroadam.layout.rows import Rows
from zeroadam.report import Meter
from zeroadam.transport import shared_memory
from zeroadam.transport.gloo import Gloo

ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "fused": False}


def come_late() -> None:
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    prepare = Gloo.prepare_gather

    def prepare_late(self: Gloo, exchanges: Sequence[Rows]) -> Callable[[], list[Callable[[], None]]]:
        starts = [prepare(self, [rows]) for rows in exchanges]

        def start() -> list[Callable[[], None]]:
            for rows in exchanges:
                for rank, row in enumerate(rows):
                    if rank != self.rank:
                        row.fill_(torch.nan)
            return [lambda start=start: start()[0]() for start in starts]

        return start

    Gloo.prepare_gather = prepare_late  # type: ignore[method-assign]


class Net(nn.Module):
    """Children that are read and not called, in training or in evaluation only; tied, small, and unused ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(11, 512), nn.Embedding(4, 512)
        self.attention = nn.TransformerEncoderLayer(512, 4, 600, dropout=0.0, batch_first=True)
        self.wide, self.narrow = nn.Linear(512, 700), nn.Linear(700, 512)
        self.sometimes = nn.ModuleList([nn.Linear(512, 512), nn.Linear(512, 512)])
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(512, 11)
        self.head.weight = self.embedding.weight

    def middle(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.wide(x)))

    def forward(self, tokens: Tensor, which: int = 0) -> Tensor:
        x = self.embedding(tokens) + self.position.weight
        x = checkpoint(self.middle, self.attention(x) * self.scale, use_reentrant=False)
        return self.head(x + self.sometimes[which](x))


def tokens_of(step: int, rank: int) -> Tensor:
    return torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(100 * step + rank))


def train(*, in_forward: bool, hook: bool, late: bool, compiled: bool = False) -> tuple[list[float], list[Tensor]]:
    if late:
        come_late()
    rank = dist.get_rank()
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, find_unused_parameters=True)
    optimizer = ZeroAdamW(model.parameters(), **ADAMW)
    if hook:
        model.register_comm_hook(optimizer, reduce_scatter_hook)
    if in_forward:
        optimizer.gather_in_forward(model)
    forward = torch.compile(model, backend="eager") if compiled else model
    losses = []

    def loss_of(step: int, which: int, forward: nn.Module = forward) -> Tensor:
        tokens = tokens_of(step, rank)
        return nn.functional.cross_entropy(forward(tokens, which).flatten(0, 1), tokens.roll(1).flatten())

    for step in range(6):
        for micro in range(2):  # the other layer is known only later, and not in every forward
            with model.no_sync() if micro == 0 else nullcontext():
                loss_of(2 * step + micro, int(step > 2 and micro == 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            model.eval()
            with torch.no_grad():
                losses.append(loss_of(1000, 0).item())
            model.train()
            losses.append(loss_of(1001, 1, net).item())  # of which DDP learns nothing
    parameters = [value.clone() for value in model.state_dict().values()]
    optimizer.finish_gather()
    return losses, parameters


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bitwise_as_without(run_ranks: Any, world_size: int, late: bool, hook: bool) -> None:
    """Losses, of training and of evaluation, and parameters; by sockets that deliver late, or by shared memory."""
    expected = run_ranks(run, world_size, {"in_forward": False, "hook": hook, "late": False})
    found = run_ranks(run, world_size, {"in_forward": True, "hook": hook, "late": late})
    for (losses, parameters), (expected_losses, expected_parameters) in zip(found, expected, strict=True):
        assert losses == expected_losses
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected_parameters, strict=True))


@pytest.mark.slow
def test_compiled_models(run_ranks: Any) -> None:
    """To the rounding of other graphs, as these end at the modules' hooks; what comes late would be NaN."""
    options = {"hook": True, "late": True, "compiled": True}
    (expected, _), _ = run_ranks(run, 2, {**options, "in_forward": False})
    (losses, _), _ = run_ranks(run, 2, {**options, "in_forward": True})
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)


def run(options: dict[str, bool]) -> tuple[list[float], list[Tensor]]:
    return train(**options)


def layers() -> tuple[nn.Module, ZeroAdamW, list[str]]:
    """A model of three large layers whose gathers come late, after two steps; and what is waited for and called."""
    come_late()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    optimizer = ZeroAdamW(model.parameters(), **ADAMW)
    weights = [layer.weight for layer in model]
    optimizer.gather_in_forward(model)
    for _ in range(2):
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()
    events: list[str] = []
    for index, layer in enumerate(model):
        gather = optimizer._gathers.waiting[weights[index]]
        wait = gather.wait

        def wait_and_tell(index: int = index, wait: Callable[[], None] = wait) -> None:
            events.append(f"wait {index}")
            wait()

        gather.wait = wait_and_tell
        layer.register_forward_hook(lambda *_, index=index: events.append(f"ran {index}"))
    return model, optimizer, events


def overlap() -> list[str]:
    model, optimizer, events = layers()
    assert optimizer.param_groups[0]["params"][4].isnan().any()
    assert not model(torch.ones(1, 512)).isnan().any()
    return events


def test_waits_when_it_is_time(run_ranks: Any) -> None:
    """A layer runs before the parameters of the next are waited for."""
    for events in run_ranks(overlap, 2):
        assert events == ["wait 0", "ran 0", "wait 1", "ran 1", "wait 2", "ran 2"]


def readers(model: nn.Module, own: ZeroAdamW) -> list[Callable[[], Any]]:
    return [
        own.step,
        own.finish_gather,
        own.consolidate_state_dict,
        lambda: own.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
        lambda: own.load_state_dict(own.state_dict(sharded=True)),
        model.state_dict,
        lambda: copy.deepcopy(model),
        lambda: copy.copy(model[2]._parameters),
        lambda: model.double().float(),
        lambda: list(model.parameters()),
        lambda: dict(model[2]._parameters),
        lambda: {}.update(model[2]._parameters),
        lambda: {**model[2]._parameters},
        lambda: model[2]._parameters.get("weight"),
        lambda: model[2]._parameters.pop("weight"),
        lambda: model[2].state_dict(),
        lambda: model[2].load_state_dict(model[1].state_dict()),
    ]


def other_readers() -> None:
    prepare = Gloo.prepare_gather
    for index in range(len(readers(nn.Module(), ZeroAdamW([nn.Parameter(torch.ones(1))])))):
        Gloo.prepare_gather = prepare  # type: ignore[method-assign]
        model, own, _ = layers()
        weight = own.param_groups[0]["params"][4]
        assert weight.isnan().any()
        readers(model, own)[index]()
        if index == 0:
            assert own._gathers.waiting  # the next ones
            own.finish_gather()
        assert not weight.isnan().any(), index


def test_who_else_reads_waits(run_ranks: Any) -> None:
    run_ranks(other_readers, 2)


def read(module: nn.Module) -> Tensor:
    """The weight of a module that may not have been called yet; then the one that is pruned is an old one."""
    weight: Tensor = module.weight_orig if hasattr(module, "weight_orig") else module.weight
    return weight


class Reader(nn.Module):
    """Reads weights of its own, of its children and of other modules, in any order, before or after calling them."""

    def __init__(self, rng: random.Random, depth: int, others: list[nn.Module]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        if rng.random() < 0.3:
            prune.l1_unstructured(self, "weight", 0.3)
        elif rng.random() < 0.3:
            parametrizations.orthogonal(self, "weight")
        self.layers = nn.ModuleList([Reader(rng, depth - 1, others) for _ in range(rng.randrange(3))] if depth else [])
        self.gru = nn.GRU(64, 64, batch_first=True) if rng.random() < 0.2 else None
        self.others = [rng.choice(others) for _ in range(rng.randrange(2))] if others else []  # no children
        self.plan = [rng.choice(["call", "read", "other", "checkpoint", "own", "norm"]) for _ in range(4)]
        others.append(self)
        if rng.random() < 0.3:
            self.register_forward_pre_hook(lambda module, args: (args[0] + module.weight.mean(),))

    def forward(self, x: Tensor) -> Tensor:
        for what in self.plan:
            if what == "own":
                x = torch.tanh(x @ self.weight)
            elif what == "norm":
                x = x * sum(p.square().mean() for p in self.parameters(recurse=False))
            for layer in self.layers if what in ("call", "read", "checkpoint") else ():
                if what == "read":
                    x = x + x @ read(layer).T
                else:
                    x = layer(x) if what == "call" else checkpoint(layer, x, use_reentrant=False)
            for other in self.others if what == "other" else ():
                x = x + 0.1 * read(other).sum()
        return x if self.gru is None else self.gru(x)[0]


def random_readers(seeds: list[int]) -> None:
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    prepare = Gloo.prepare_gather
    for seed in seeds:
        found = []
        for in_forward in (False, True):
            Gloo.prepare_gather = prepare  # type: ignore[method-assign]
            come_late()
            rng = random.Random(seed)
            torch.manual_seed(seed)
            others: list[nn.Module] = []
            net = nn.Sequential(nn.Linear(64, 64), Reader(rng, 2, others))
            optimizer = ZeroAdamW(net.parameters(), **ADAMW, bucket_cap_mb=0.02)
            if in_forward:
                optimizer.gather_in_forward(net)
            params = [param for group in optimizer.param_groups for param in group["params"]]
            for step in range(5):
                if step == 2:  # a forward that fails half-way
                    handle = rng.choice(others).register_forward_hook(lambda *_: 1 / 0)
                    with suppress(ZeroDivisionError):
                        net(torch.ones(2, 3, 64))
                    handle.remove()
                loss = net(torch.ones(2, 3, 64)).square().mean()
                loss.backward()
                found.append(loss.item())
                optimizer.step()
                for param in params:
                    param.grad = None
            optimizer.finish_gather()
        assert found[:5] == found[5:], seed


@pytest.mark.slow
def test_every_read_through_a_module_waits(run_ranks: Any) -> None:
    """Random modules; the gathers come late, and what is read too early is NaN."""
    run_ranks(random_readers, 2, list(range(int(os.environ.get("ZEROADAM_TEST_READERS", "12")))))


def copies() -> None:
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 3))
    other = nn.Linear(512, 512)
    optimizer = ZeroAdamW([*model.parameters(), *other.parameters()], **ADAMW)
    optimizer.gather_in_forward(model)
    average = AveragedModel(model)
    for step in range(3):
        (model(torch.ones(1, 512)).sum() + other(torch.ones(1, 512)).sum()).backward()
        optimizer.step()
        assert not set(optimizer._gathers.waiting) & set(other.parameters()), "nobody would wait for them"
        optimizer.finish_gather()
        average.update_parameters(model)
        assert torch.equal(average(torch.ones(1, 512)), copy.deepcopy(average)(torch.ones(1, 512)))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert torch.equal(again(torch.ones(1, 512)), model(torch.ones(1, 512))), step
        assert again.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="model whose parameters this optimizer holds"):
        optimizer.gather_in_forward(nn.Linear(2, 2))


def test_models_can_be_copied_and_saved(run_ranks: Any) -> None:
    """And what is not in the model has been gathered when step() returns."""
    run_ranks(copies, 2)


def fail() -> None:
    model, own, _ = layers()
    handle = model[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 512))
    handle.remove()
    for _ in range(2):
        assert not model(torch.ones(1, 512)).isnan().any()
        model(torch.ones(1, 512)).sum().backward()
        own.step()


def test_goes_on_after_a_failed_forward(run_ranks: Any) -> None:
    run_ranks(fail, 2)


def evaluate_on_one(shared: str) -> None:
    os.environ["ZEROADAM_SHARED_MEMORY"] = shared
    shared_memory.SLOT_BYTES = 2**14
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    for param in model.parameters():
        nn.init.constant_(param, 0.01)
    optimizer = ZeroAdamW(model.parameters(), **ADAMW)
    optimizer.gather_in_forward(model)
    for _ in range(3):
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()
        if dist.get_rank() == 0:
            with torch.no_grad():
                model(torch.ones(1, 512))
        dist.barrier()
    optimizer.finish_gather()


@pytest.mark.parametrize("shared", ["0", "1"])
def test_one_rank_may_evaluate_alone(run_ranks: Any, shared: str) -> None:
    """Its gathers need no help of the others, who wait for it."""
    run_ranks(evaluate_on_one, 2, shared)


def with_buffers() -> None:
    for layer, options, warned in (
        (nn.BatchNorm1d(3), {}, True),
        (nn.BatchNorm1d(3), {"forward_sync_buffers": False}, False),
        (nn.Linear(3, 3), {}, False),
    ):
        model = DistributedDataParallel(layer, gradient_as_bucket_view=True, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ZeroAdamW(model).gather_in_forward(model)
        found = [str(warning.message) for warning in caught if "forward_sync_buffers=False" in str(warning.message)]
        assert bool(found) == (warned and dist.get_backend() != "gloo")


@pytest.mark.parametrize("transport", ["backend", "sockets"])
def test_buffers_that_queue_behind_the_gathers_are_named(run_ranks: Any, transport: str) -> None:
    run_ranks(with_buffers, 2, transport=transport)


def test_each_stream_that_reads_a_parameter_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where the first reader's wait does not hold the others up."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            events.append(f"{self.name} has it")
            return "event"

        def wait_event(self, event: str) -> None:
            assert event == "event"
            events.append(f"{self.name} waits")

    streams = {name: Stream(name) for name in ("first", "other")}
    gather = param_bucket.Gather([nn.Parameter(torch.ones(2))], lambda: events.append("arrived"), None)
    for name in ("first", "first", "other"):
        monkeypatch.setattr(param_bucket, "current_stream", lambda _, name=name: streams[name])
        gather.finish()
    assert events == ["arrived", "first has it", "other waits"]


def test_elsewhere_than_on_the_cpu_a_gather_waits_for_readers_until_the_next_step() -> None:
    gathers, finished = Gathers(Meter()), []
    for device in ("cpu", "meta"):
        param = nn.Parameter(torch.ones(2, device=device))
        gathers.waiting[param] = SimpleNamespace(finish=lambda device=device: finished.append(device))  # type: ignore
        gathers.finish_of([param])
        gathers.finish_of([param])
    gathers.finish()
    assert finished == ["cpu", "meta", "meta", "meta"]
    assert not gathers.waiting
