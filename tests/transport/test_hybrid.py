"""State cut over some ranks and copied on the others: the same bits on all replicas, and those of a plain reference."""

import contextlib
import itertools
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from patience import at_most
from placed import ADAMW, HOOKS, Net, batch_of, expected_after
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

import zeroadam
from zeroadam import GradScaler, ZeroAdamW
from zeroadam.layout.shard import shard
from zeroadam.transport import hybrid, shared_memory
from zeroadam.update.adam import Update

MESHES = [(1, 2), (2, 1), (2, 2), (3, 2), (2, 3)]
NAMES = ("replicate", "shard")


def letters(shape: tuple[int, int]) -> str:
    """The shard group of each rank."""
    return "".join(name * shape[1] for name in "abc"[: shape[0]])


def train(shape: tuple[int, int], hook: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The sums that this rank owns after each backward, and at the end parameters and its share of the state."""
    shared_memory.SLOT_BYTES = 2**16
    net = Net().to(dtype)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.3)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=NAMES)
    optimizer = ZeroAdamW(model, device_mesh=mesh, bucket_cap_mb=0.3, hook=HOOKS[hook], **ADAMW, **options)
    if dist.get_rank() % 2:
        optimizer.gather_in_forward(model)
    grads = []
    for step in range(5):
        model(batch_of(dist.get_rank(), step, dtype)).square().sum().backward()
        grads += [param.grad.clone() for param in net.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    state = []
    for param in net.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[param][name]
            assert isinstance(value, DTensor)
            assert value.device_mesh is mesh
            assert value.placements[0] == Replicate()
            state.append(value.to_local().clone())
    return grads, [param.detach().clone() for param in net.parameters()], state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hook", ["same", "bfloat16"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_replicas_have_the_same_bits_and_those_of_the_reference(
    run_ranks: Any, shape: tuple[int, int], hook: str, dtype: torch.dtype
) -> None:
    """With shard groups on a host each, across hosts, and all on one; the sum of a group first, then the replicas."""
    world_size = shape[0] * shape[1]
    *sums, params = expected_after(letters(shape), hook, dtype)
    for hosts in ("", letters(shape), "abababab"[:world_size]):
        if hosts == "abababab"[:world_size] and shape[1] > 2:
            continue  # the ranks of a group on several hosts, which has an order of its own
        found = run_ranks(train, world_size, shape, hook, dtype, {}, hosts=hosts)
        for rank, (grads, mine, state) in enumerate(found):
            assert all(map(torch.equal, mine, params)), (rank, hosts)
            assert all(map(torch.equal, state, found[rank % shape[1]][2])), (rank, hosts)
            for grad, total in zip(grads, [total for of_step in sums for total in of_step], strict=True):
                if grad.dim():
                    own = shard(total, shape[1], rank % shape[1])
                    assert torch.equal(shard(grad, shape[1], rank % shape[1]), own)
                    assert grad.count_nonzero() == own.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_low_precision_in_float32_all_the_way(run_ranks: Any, dtype: torch.dtype) -> None:
    for hook in ("same", "bfloat16"):
        *_, params = expected_after("aabb", hook, dtype, exact=True)
        for _, mine, _ in run_ranks(train, 4, (2, 2), hook, dtype, {"ordered_sums": True}, hosts="aabb"):
            assert all(map(torch.equal, mine, params))


def out_of_step(fault: str, bad: int) -> tuple[str, float]:
    """What this rank raises when one rank, or all of its shard group, does something else."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 1))
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.005)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)
    optimizer = ZeroAdamW(model, device_mesh=mesh)
    mine = dist.get_rank() == bad or (fault.endswith("by a group") and dist.get_rank() // 2 == bad // 2)
    begin = time.monotonic()
    step = Update.step

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        for iteration in range(5):
            now = mine and iteration == 2
            if iteration == 2:
                dist.barrier()
                begin = time.monotonic()
            for _ in range(2 if now and fault.startswith("backward repeated") else 1):
                model(torch.ones(3, 60)).square().sum().backward()
            if now and fault.startswith("other lr"):
                optimizer.param_groups[0]["lr"] = 0.5
            if now and fault == "step interrupted":
                Update.step = broken  # type: ignore[method-assign]
            try:
                for _ in range(0 if now and fault.startswith("step left out") else 1 + (now and "repeated" in fault)):
                    optimizer.step()
            except KeyboardInterrupt:
                Update.step = step  # type: ignore[method-assign]
            optimizer.zero_grad()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return "", 0.0


FAULTS = ["step left out", "step repeated", "step interrupted", "backward repeated", "other lr"]
FAULTS += [f"{fault} by a group" for fault in FAULTS if fault != "step interrupted"]


@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("hosts", ["", "aabb", "abab"])
@pytest.mark.parametrize("fault", FAULTS)
def test_ranks_out_of_step_raise_on_all(run_ranks: Any, fault: str, hosts: str, bad: int) -> None:
    """Also where all ranks of a shard group do the same, so that only the other replica can tell."""
    answers = run_ranks(out_of_step, 4, fault, bad, hosts=hosts)
    for rank, (message, seconds) in enumerate(answers):
        assert message, (rank, answers)
        assert seconds < 10, (rank, answers)
    if fault.startswith("other lr"):
        assert all("disagree on lr of group 0: " in message for message, _ in answers), answers


def saved(shape: tuple[int, int], folder: str, load: bool) -> list[Tensor]:
    """Train, save and load with torch.distributed.checkpoint; the parameters after some more steps."""
    net = Net()
    options: dict[str, Any] = {**ADAMW}
    if shape != (0, 0):
        options["device_mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=NAMES)
    optimizer: Any = (ZeroAdamW if shape != (0, 0) else torch.optim.AdamW)(net.parameters(), **options)

    def train(steps: range) -> None:
        for step in steps:
            net(batch_of(0, step, torch.float32)).square().sum().backward()  # alike on all ranks
            optimizer.step()
            optimizer.zero_grad()

    if not load:
        train(range(3))
        states = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
        dcp.save(states, checkpoint_id=folder)
        return [param.detach() for param in net.parameters()]
    states = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    train(range(3, 6))
    return [param.detach() for param in net.parameters()]


def loaded(shape: tuple[int, int], folders: list[str]) -> list[list[Tensor]]:
    return [saved(shape, folder, True) for folder in folders]


KINDS = {"2x2": (2, 2), "1x4": (1, 4), "4x1": (4, 1), "1x3": (1, 3), "AdamW": (0, 0)}


@pytest.mark.slow
def test_checkpoints_move_between_all_shapes(run_ranks: Any, tmp_path: Path) -> None:
    """One copy of each tensor is saved. Every shape goes on as any other does, to the bit."""

    def ranks(shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] or 1

    found = {}
    for source, shape in KINDS.items():
        folder = str(tmp_path / source)
        run_ranks(saved, ranks(shape), shape, folder, False)
        found[source] = run_ranks(saved, 1, (0, 0), folder, True)[0]
    sizes = {name: sum(file.stat().st_size for file in (tmp_path / name).glob("*.distcp")) for name in KINDS}
    assert max(sizes.values()) < 1.1 * min(sizes.values()), sizes
    for target, shape in KINDS.items():
        for of_rank in run_ranks(loaded, ranks(shape), shape, [str(tmp_path / source) for source in KINDS]):
            for source, params in zip(KINDS, of_rank, strict=True):
                assert all(map(torch.equal, params, found["AdamW"])), (source, target)


class Whole(nn.Module):
    """Of integer weights and inputs, so that sums are exact in any order; one weight is left out where asked for."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(5, 7), (300, 40), (3,), (1, 9), ()]
        self.weights = nn.ParameterList([torch.zeros(shape) for shape in shapes])

    def forward(self, x: Tensor, leave_out: int = -1) -> Tensor:
        return torch.stack([(w * (x + i)).sum() for i, w in enumerate(self.weights) if i != leave_out]).sum()


PATTERNS = ["ss", "ns", "sns", "sss", "s-s", "s0s"]


def several_backwards(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """s: a backward; n: in no_sync(); -: zeroed between, to None; 0: in place. One parameter is left out of some."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=NAMES)
    for pattern, leaves_out in itertools.product(PATTERNS, (False, True)):
        if options and "sn" in pattern:
            continue  # refused with grad_dtype, by its own tests
        net = Whole().to(torch.bfloat16 if options else torch.float32)
        model = DistributedDataParallel(net, gradient_as_bucket_view=True, find_unused_parameters=leaves_out)
        optimizer = ZeroAdamW(model, device_mesh=mesh, **options)
        for step in range(3):
            expected = [0.0] * len(net.weights)
            for index, what in enumerate(pattern):
                if what in "-0":
                    optimizer.zero_grad(set_to_none=what == "-")
                    expected = [0.0] * len(net.weights)
                    continue
                left_out = index if leaves_out and (step + index) % 3 == 0 else -1
                with model.no_sync() if what == "n" else contextlib.nullcontext():
                    model(torch.tensor(float(dist.get_rank() + index)), left_out).backward()
                for i in range(len(expected)):
                    if i != left_out:
                        expected[i] += sum(rank + index + i for rank in range(dist.get_world_size()))
            place = dist.get_rank() % shape[1]
            for i, (param, total) in enumerate(zip(net.weights, expected, strict=True)):
                if param.dim() and param.grad is not None:
                    own = shard(param.grad, shape[1], place)
                    assert torch.equal(own, torch.full_like(own, total)), (pattern, step, i, own.flatten()[:3], total)
                    assert param.grad.count_nonzero() == own.count_nonzero()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"grad_dtype": torch.float32}], ids=["plain", "grad_dtype"])
@pytest.mark.parametrize(
    "shape", [(2, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in [(1, 2), (2, 2), (3, 1)])], ids=str
)
def test_another_backward_adds_to_the_sums(run_ranks: Any, shape: tuple[int, int], options: dict[str, Any]) -> None:
    for hosts in ("", letters(shape)):
        run_ranks(several_backwards, shape[0] * shape[1], shape, options, hosts=hosts)


def changed_between() -> None:
    net = nn.Linear(64, 64)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    ZeroAdamW(model, device_mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=NAMES))
    model(torch.ones(64)).sum().backward()
    net.weight.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"was changed between two backwards|has ended|failed"):
        model(torch.ones(64)).sum().backward()


def test_sums_that_were_changed_are_not_added_to(run_ranks: Any) -> None:
    run_ranks(changed_between, 2)


def meshes() -> None:
    for ranks in ([[1, 0], [3, 2]], [[3, 1], [0, 2]], [[0, 3], [2, 1]], [[2, 3], [0, 1]]):
        with pytest.raises(ValueError, match="the ranks of device_mesh do not ascend"):
            ZeroAdamW([nn.Parameter(torch.ones(8, 2))], device_mesh=DeviceMesh("cpu", ranks, mesh_dim_names=NAMES))
    model = DistributedDataParallel(nn.Linear(4, 4), gradient_as_bucket_view=True)
    ZeroAdamW(model, device_mesh=DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=NAMES))
    model(torch.ones(4)).sum().backward()


def test_a_mesh_whose_ranks_do_not_ascend_is_refused(run_ranks: Any) -> None:
    run_ranks(meshes, 4)


def two_dtypes() -> None:
    hybrid.RUN_BYTES = hybrid.BLOCK_BYTES = 2**10
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    for index, layer in enumerate(net):
        layer.to(torch.bfloat16 if index % 2 else torch.float32)
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.01)
    optimizer = ZeroAdamW(model, device_mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=NAMES))
    for _ in range(10):
        sum(layer(torch.ones(40, dtype=layer.weight.dtype)).float().sum() for layer in net).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_rows_of_two_dtypes_between_three_replicas(run_ranks: Any) -> None:
    run_ranks(two_dtypes, 3, hosts="abc")


def stopped(fault: str, bad: int) -> None:
    net = Net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)  # whose groups have a timeout of half an hour
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.1)
    optimizer = ZeroAdamW(model, device_mesh=mesh)

    def fail(_: Any) -> None:
        os.kill(os.getpid(), signal.Signals[fault])

    for step in range(4):
        if step == 2 and dist.get_rank() == bad:
            net.layers[0].weight.register_hook(fail)
        model(batch_of(dist.get_rank(), step, torch.float32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("hosts", ["", "aabb", "abab"])
def test_a_rank_killed_or_stopped_ends_all_others(run_ranks: Any, hosts: str, fault: str) -> None:
    start = time.monotonic()
    seconds = 5 if fault == "SIGSTOP" else 60
    with pytest.raises(pytest.fail.Exception) as raised:
        run_ranks(stopped, 4, fault, 1, timeout=at_most(20), hosts=hosts, group_timeout=seconds, lost=1)
    assert time.monotonic() - start < at_most(8)
    told = "has ended|did not come within|failed|[Tt]imed out|[Cc]onnection|another collective|in backward"
    for rank in (0, 2, 3):
        found = re.search(rf"rank {rank}:\n(Traceback.*?)(?=\n\nrank|\Z)", str(raised.value) + "\n", re.DOTALL)
        assert found, str(raised.value)
        assert re.search(f"RuntimeError: .*({told})", found[1]), found[1]


def looks_at_gradients() -> list[Any]:
    """Clipping, whether all are finite, loss scaling, consolidation: alike on all ranks, and as AdamW's."""
    nets = [Net() for _ in range(2)]
    models = [DistributedDataParallel(net, gradient_as_bucket_view=True) for net in nets]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)
    optimizer = ZeroAdamW(models[0], device_mesh=mesh, **ADAMW)
    adamw = torch.optim.AdamW(nets[1].parameters(), **ADAMW)
    scaler = GradScaler("cpu", init_scale=4.0)
    norms = []
    for step in range(3):
        losses = [model(batch_of(dist.get_rank(), step, torch.float32)).square().sum() for model in models]
        if step == 2 and dist.get_rank() == 3:
            losses[0] = losses[0] * torch.inf
        scaler.scale(losses[0]).backward()
        losses[1].backward()
        scaler.unscale_(optimizer)
        norms.append(float(optimizer.clip_grad_norm_(0.5)))
        expected = torch.nn.utils.clip_grad_norm_(nets[1].parameters(), 0.5)
        assert optimizer.grads_are_finite() == (step < 2)
        scaler.step(optimizer)
        scaler.update()
        if step < 2:
            assert norms[-1] == pytest.approx(float(expected), rel=1e-5)
            adamw.step()
        optimizer.zero_grad()
        adamw.zero_grad()
    assert scaler.get_scale() == 2.0
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    optimizer.consolidate_state_dict(to=1)
    if dist.get_rank() % 2 == 1:
        for mine, its in zip(
            optimizer.state_dict()["state"].values(), adamw.state_dict()["state"].values(), strict=True
        ):
            torch.testing.assert_close(mine["exp_avg"], its["exp_avg"], rtol=1e-4, atol=1e-6)
    return norms


def test_what_looks_at_all_gradients(run_ranks: Any) -> None:
    first, *others = run_ranks(looks_at_gradients, 4)
    assert all(repr(norms) == repr(first) for norms in others)


def save_one_file(folder: str) -> list[str]:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, device_mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES), **ADAMW)
    model(batch_of(0, 0, torch.float32)).square().sum().backward()
    optimizer.step()
    written, write = [], torch.save

    def counted(obj: Any, file: Any) -> None:
        written.append("written")
        write(obj, file)

    torch.save = counted
    zeroadam.save({"optimizer": optimizer}, f"{folder}/last.pt", to=1)
    loaded = torch.load(f"{folder}/last.pt")["optimizer"]
    optimizer.load_state_dict(loaded)
    assert [entry["step"].item() for entry in loaded["state"].values()] == [1] * len(list(net.parameters()))
    with pytest.raises(
        (OSError, RuntimeError), match=r"File name too long|rank 1 of the process group failed: OSError"
    ):
        zeroadam.save({"optimizer": optimizer}, f"{folder}/{'x' * 300}", to=1)
    return written


def test_one_rank_writes_the_plain_file(run_ranks: Any, tmp_path: Path) -> None:
    assert run_ranks(save_one_file, 4, str(tmp_path)) == [[], ["written"], [], []]


def refused() -> None:
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=NAMES)
    flat = init_device_mesh("cpu", (2,))
    with pytest.raises(
        ValueError, match=r'init_device_mesh\(device_type, \(R, S\), mesh_dim_names=\("replicate", "shard"'
    ):
        ZeroAdamW(model, device_mesh=flat)
    with pytest.raises(ValueError, match="give one of them"):
        ZeroAdamW(model, device_mesh=mesh, process_group=dist.group.WORLD)
    optimizer = ZeroAdamW(model, device_mesh=mesh)
    with pytest.raises(RuntimeError, match="device_mesh= is not for Join"), Join([model, optimizer]):
        pass


def refused_by_another_backend() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=NAMES)
    with pytest.raises(ValueError, match=r"process_group=device_mesh.get_group\(1\)"):
        ZeroAdamW(Net().parameters(), device_mesh=mesh)


def test_what_is_not_for_hybrid_sharding_is_refused(run_ranks: Any) -> None:
    run_ranks(refused, 2)
    run_ranks(refused_by_another_backend, 2, transport="backend")


def subgroup(hook: bool) -> list[Tensor]:
    """State over the ranks of a host, DistributedDataParallel over all of them, no hook."""
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    optimizer = ZeroAdamW(net.parameters(), process_group=pairs[dist.get_rank() // 2], **ADAMW)
    plain = Net()
    reference = DistributedDataParallel(plain, gradient_as_bucket_view=True)
    adamw = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for step in range(4):
        for one, its in ((model, optimizer), (reference, adamw)):
            one(batch_of(dist.get_rank(), step, torch.float32)).square().sum().backward()
            its.step()
            its.zero_grad()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
    weight = net.layers[0].weight
    assert optimizer.state[weight]["exp_avg"].to_local().numel() < 0.6 * weight.numel()
    if hook:
        with pytest.raises(RuntimeError, match="another process group than the optimizer, so hook=None"):
            ZeroAdamW(model, process_group=pairs[dist.get_rank() // 2])
    return [param.detach() for param in net.parameters()]


def test_a_subgroup_without_the_hook(run_ranks: Any) -> None:
    """`process_group=` of a host's ranks: copies on the others, as DDP averages over all; bit for bit AdamW's."""
    first, *others = run_ranks(subgroup, 4, True)
    assert all(all(map(torch.equal, params, first)) for params in others)
