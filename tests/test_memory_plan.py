"""plan: to the byte what a run allocates, and the bytes that it sends."""

import argparse
import gc
import inspect
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import COMMAND
from commands import zeroadam as command_line
from patience import at_most
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from train import GPT

import zeroadam
from zeroadam import ZeroAdamW, bf16_reduce_scatter_hook, plan, reduce_scatter_hook
from zeroadam.cli import plan_arguments, quantities
from zeroadam.memory_plan import RankBytes, whole_tensors
from zeroadam.update import adam
from zeroadam.update.rounding import bitsandbytes

SMALL_BLOCK = 2**13
PRECISIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "master": {"master_dtype": torch.float32},
    "remainder": {"master_dtype": torch.float32, "store_param_remainders": True},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "8-bit state": {"state_dtype": torch.uint8},
    "all at once": {"master_dtype": torch.float32, "store_param_remainders": True, "state_dtype": torch.bfloat16},
    "small buckets": {"bucket_cap_mb": 0.1},
}


def gpt(dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    model = GPT(width=192, layers=2, heads=3, context=32).to(dtype)
    model.position.requires_grad_(False)
    return model


def live_bytes() -> int:
    """Of all tensors on the CPU but frozen ones; without integers, of which meshes are made."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance() would wake lazy objects
            local = thing.to_local() if isinstance(thing, DTensor) else thing
            if local.device.type == "cpu" and local.dtype not in (torch.int32, torch.int64):
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def counted(dtype: torch.dtype, options: dict[str, Any], *, hook: bool) -> tuple[RankBytes, RankBytes]:
    """(planned, counted); of the latter, staging is what is nothing else, and nothing is said of what is sent."""
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    bitsandbytes()  # has tensors of its own
    gc.freeze()  # what there is so far is neither counted nor looked through each time
    model = gpt(dtype)
    parameters = live_bytes()
    optimizer = ZeroAdamW(model.parameters(), **options)
    backend = "gloo" if dist.get_backend() == "gloo" else "nccl"
    planned = plan(model.parameters(), dist.get_world_size(), backend=backend, **options)[dist.get_rank()]
    wanted = planned.moments + planned.master + planned.steps + planned.staging
    deadline = time.monotonic() + at_most(10)
    while (held := live_bytes() - parameters) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)  # what gloo has sent last may live a moment longer in its thread
    state = {
        name: sum(
            (value.to_local() if isinstance(value, DTensor) else value).nbytes
            for entry in optimizer.state.values()
            for key, value in entry.items()
            if (key == "step", key in ("master", "remainder")) == name
        )
        for name in ((True, False), (False, True), (False, False))
    }
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if hook:
        wrapped.register_comm_hook(optimizer, reduce_scatter_hook)
    for _ in range(2):
        wrapped(torch.zeros(1, 32, dtype=torch.long)).sum().backward()
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad()
    found = RankBytes(
        parameters=parameters,
        gradients=gradients,
        moments=state[False, False],
        master=state[False, True],
        steps=state[True, False],
        staging=held - sum(state.values()),
        sent=planned.sent,
    )
    return planned, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world_size", "transport"),
    [
        (1, "sockets"),
        (2, "sockets"),
        pytest.param(4, "sockets", marks=pytest.mark.slow),
        pytest.param(2, "backend", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_planned_bytes_are_allocated_bytes(run_ranks: Any, world_size: int, transport: str, dtype: torch.dtype) -> None:
    """In every precision there is, of every rank."""
    for rows in zip(*run_ranks(count_all, world_size, dtype, transport=transport), strict=True):
        for planned, found in rows:
            assert planned == found


def count_all(dtype: torch.dtype) -> list[tuple[RankBytes, RankBytes]]:
    return [counted(dtype, options, hook=index % 2 == 0) for index, options in enumerate(PRECISIONS.values())]


def after_steps(options: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all tensors but parameters after a step without gradients left, and those that were planned."""
    bitsandbytes()
    gc.freeze()
    model = gpt(torch.bfloat16 if "master_dtype" in options else torch.float32)
    before = live_bytes()
    optimizer = ZeroAdamW(model.parameters(), **options)
    for _ in range(2):
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()
    planned = plan(model.parameters(), dist.get_world_size(), backend="gloo", **options)[dist.get_rank()]
    return live_bytes() - before, planned.moments + planned.master + planned.steps + planned.staging


def all_after_steps() -> list[tuple[int, int]]:
    os.environ["ZEROADAM_SHARED_MEMORY"] = "0"
    adam.BLOCK_NUMEL = SMALL_BLOCK  # a fraction of the model, whose moments would show
    return [after_steps(options) for options in PRECISIONS.values()]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_after_a_step_only_scratch_memory_is_left(run_ranks: Any, world_size: int) -> None:
    """At most five buffers of a block: a gradient, a weight and moments in float32; rounded ones in fewer bits."""
    for ranks in run_ranks(all_after_steps, world_size):
        for held, planned in ranks:
            assert planned <= held <= planned + 5 * 4 * 2 * SMALL_BLOCK


def torchs_cut() -> tuple[list[int], list[int]]:
    params = list(gpt(torch.float32).requires_grad_().parameters())
    groups = [{"params": params[::2]}, {"params": params[1::2]}]
    optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    held = sum(value.nbytes for entry in optimizer.optim.state.values() for value in entry.values())
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    return whole_tensors([{"params": params[::2]}, {"params": params[1::2]}], dist.get_world_size()), everyone


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_cut_of_zero_redundancy_optimizer(run_ranks: Any, world_size: int) -> None:
    for planned, held in run_ranks(torchs_cut, world_size):
        assert planned == held


def test_bytes_sent() -> None:
    """Per parameter of 4 bytes: by the formulas of the README, and fewer in bfloat16."""
    params = [nn.Parameter(torch.empty(64, 64, device="meta")) for _ in range(3)]
    size = sum(param.nbytes for param in params)
    for hook, factor in ((None, 3.0), (reduce_scatter_hook, 2.0), (bf16_reduce_scatter_hook, 1.5)):
        for world_size in (1, 2, 4, 8):
            for rank in plan(params, world_size, hook=hook):
                assert rank.sent == factor * size * (world_size - 1) / world_size


def test_hybrid_sharding() -> None:
    """The memory is that of one shard group; the gradients of a rank's share go to the replicas and back."""
    params = [nn.Parameter(torch.empty(64, 64, device="meta")) for _ in range(3)]
    size = sum(param.nbytes for param in params)
    for replicas, shards in ((1, 4), (2, 2), (4, 1), (4, 8)):
        for hook, once in ((reduce_scatter_hook, 1.0), (bf16_reduce_scatter_hook, 0.5)):
            ranks = plan(params, replicas * shards, shard_size=shards, hook=hook)
            assert len(ranks) == replicas * shards
            assert [rank.total for rank in ranks] == [rank.total for rank in plan(params, shards)] * replicas
            inside, across = (shards - 1) / shards, (replicas - 1) / replicas / shards
            assert all(rank.sent == size * (1 + once) * (inside + across) for rank in ranks)
    with pytest.raises(ValueError, match="6 ranks are no groups of 4: give a shard size that divides"):
        plan(params, 6, shard_size=4)
    with pytest.raises(ValueError, match="bucket_cap_mb is a positive number of megabytes, not 0"):
        plan(params, 2, bucket_cap_mb=0)


def sums(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all tensors after a step with float32 sums of gradients over those without, and as planned."""
    held, planned = [], []
    for options in ({}, {"grad_dtype": torch.float32}):
        gc.freeze()
        model = gpt(dtype)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = ZeroAdamW(wrapped, master_dtype=torch.float32, **options)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                wrapped(torch.zeros(1, 32, dtype=torch.long)).sum().backward()
            optimizer.step()
        held.append(live_bytes())
        given = {"master_dtype": torch.float32, "hook": reduce_scatter_hook, "backend": "gloo", **options}
        ranks = plan(model.parameters(), dist.get_world_size(), **given)
        planned.append(ranks[dist.get_rank()].gradients)
        assert planned[0] == sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
        del model, wrapped, optimizer
    return held[1] - held[0], planned[1] - planned[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 4])  # at W = 1 less scratch memory is needed, as nothing is cast
@pytest.mark.slow
def test_sums_of_gradients_are_planned(run_ranks: Any, world_size: int, dtype: torch.dtype) -> None:
    """4/W bytes per parameter in bfloat16, whatever the number of backwards; float32 gradients hold their own."""
    for held, planned in run_ranks(sums, world_size, dtype):
        assert held == planned
        assert (planned > 0) == (dtype == torch.bfloat16)


def zeroadam_plan(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return command_line("plan", *arguments, cwd=cwd)


def test_command(tmp_path: Path) -> None:
    """A number, a factory, a state dict and a safetensors file of the same model say the same."""
    (tmp_path / "models.py").write_text("import torch\n\ndef small():\n    return torch.nn.Linear(512, 1024)\n")
    model = nn.Linear(512, 1024)
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "model.pt")
    header = {"__metadata__": {}, "weight": {"dtype": "F32", "shape": [1024, 512], "data_offsets": [0, 2097152]}}
    header["bias"] = {"dtype": "F32", "shape": [1024], "data_offsets": [2097152, 2101248]}
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(2101248))
    expected = plan(model.parameters(), 2, amsgrad=True)
    for given in (
        ["--model", "models:small"],
        ["--state-dict", "model.pt"],
        ["--state-dict", "model.safetensors"],
    ):
        options = ["--world-size", "2,4", "--json", "--hbm", "8MB", "--amsgrad"]
        if given[0] == "--model":
            options += ["--plot", "plan.png"]
        done = zeroadam_plan(*given, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["parameters"] == 512 * 1024 + 1024
        assert [RankBytes(**rank) for rank in found["world_sizes"]["2"]["ranks"]] == expected
        assert found["world_sizes"]["4"]["adamw"] == 5 * found["parameters"] * 4 + 2 * 4
        assert (tmp_path / "plan.png").stat().st_size > 10_000
    arguments = ["--params", "1e6", "--dtype", "bf16", "--hook", "reduce_scatter", "--json", "--world-size", "4"]
    for more, each in (([], 2), (["--grad-dtype", "float32"], 2 + 4 / 4)):
        done = zeroadam_plan(*arguments, *more)
        assert [rank["gradients"] for rank in json.loads(done.stdout)["world_sizes"]["4"]["ranks"]] == [each * 1e6] * 4
    done = zeroadam_plan("--params", "7e9", "--dtype", "bf16", "--hbm", "80GB", "--world-size", "1,8")
    assert done.returncode == 0, done.stderr
    assert "56.000 ✓" in done.stdout.splitlines()[-3].replace(" ", " ")


def test_names_as_in_python_and_shorter_ones() -> None:
    """The same numbers by either."""
    long = ["--dtype", "bfloat16", "--master-dtype", "float32", "--store-param-remainders", "--state-dtype", "bfloat16"]
    short = ["--dtype", "bf16", "--master-weights", "remainder", "--state-dtype", "bfloat16"]
    hooks = (["--hook", "bf16_reduce_scatter_hook"], ["--hook", "bf16_reduce_scatter"])
    printed = []
    for names, hook, count in zip((long, short), hooks, ("1.5B", "1_500_000_000"), strict=True):
        done = zeroadam_plan("--params", count, *names, *hook, "--shard-size", "2", "--world-size", "2,4", "--json")
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    params = [nn.Parameter(torch.empty(1_500_000_000, dtype=torch.bfloat16, device="meta"))]
    options = {"master_dtype": torch.float32, "store_param_remainders": True, "state_dtype": torch.bfloat16}
    expected = plan(params, 4, shard_size=2, hook=bf16_reduce_scatter_hook, **options)
    for found in printed:
        assert [RankBytes(**rank) for rank in found["world_sizes"]["4"]["ranks"]] == expected


def test_the_table_without_rich_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('rich')")
    arguments = ["--params", "7b", "--dtype", "bf16", "--hbm", "80GB", "--world-size", "1,8"]
    rich = zeroadam_plan(*arguments).stdout
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [COMMAND, "plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=at_most(30), env=environment)
    assert done.returncode == 0, done.stderr
    plain = done.stdout
    assert plain.startswith("7 B parameters, bytes on the fullest rank, GB\n")
    assert plain.endswith("without activations, and what torch itself needs\n")
    rows = [line.split() for line in plain.splitlines()[3:-1]]
    assert rows[0] == ["1", "14.000", "14.000", "28.000", "0.000", "0.000", "56.000", "✓", "56.000", "✓", "0.000"]
    boxed = [line.replace("│", " ").split() for line in rich.splitlines() if "✓" in line]
    assert boxed == rows
    assert "\u2502" in rich
    assert "\u2502" not in plain


def test_every_option_has_help() -> None:
    parser = argparse.ArgumentParser()
    plan_arguments.add(parser)
    assert all(action.help for action in parser._actions)
    names = set(inspect.signature(plan).parameters) - {"params"}
    assert names <= {action.dest for action in parser._actions}
    for names_of in (plan_arguments.DTYPES, plan_arguments.STATE_DTYPES):
        assert all(name is None or isinstance(getattr(torch, name), torch.dtype) for name in names_of.values())
    assert all(name is None or callable(getattr(zeroadam, name)) for name in plan_arguments.HOOKS.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7b", 7e9),
        ("7B", 7e9),
        ("7e9", 7e9),
        ("124M", 124e6),
        ("1.5 B", 1.5e9),
        ("7,000", 7000),
        ("12", 12),
        ("2T", 2e12),
    ],
)
def test_counts(text: str, expected: float) -> None:
    assert quantities.count(text) == expected
    assert quantities.count(quantities.in_words(int(expected)).replace(" ", "")) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80e9), ("80GiB", 80 * 2**30), ("640 mb", 640e6), ("0.5TB", 5e11), ("80e9B", 80e9)]
)
def test_sizes(text: str, expected: float) -> None:
    assert quantities.size(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "many"], "'many' is no number of parameters: give it as 7B, 124M or 7e9"),
        (["--params", "1.5"], "'1.5' is no number of parameters"),
        (["--params", "0B"], "'0B' is no number of parameters"),
        (["--params", "7GB"], "'7GB' is no number of parameters"),
        (["--params", "1e99"], "'1e99' is no number of parameters"),
        (["--params", "7B", "--hbm", "80"], "'80' is no size: give it with its unit, as 80GB"),
        (["--params", "7B", "--hbm", "-80GB"], "argument --hbm"),
        (["--params", "7B", "--hbm", "0GB"], "'0GB' is no size"),
        (["--params", "7B", "--bucket-cap-mb", "-1"], "'-1' is no positive number"),
        (["--params", "7B", "--bucket-cap-mb", "0"], "'0' is no positive number"),
        (["--params", "7B", "--world-size", "10000000"], "'10000000' is no list of numbers of ranks"),
        (["--params", "7B", "--dtype", "fp32", "--master-weights", "remainder"], "of bfloat16 parameters only"),
        (["--params", "7B", "--dtype", "fp16", "--master-weights", "remainder"], "and these are float16"),
        (["--params", "7B", "--master-dtype", "float32"], "16-bit parameters only, and these are float32"),
        (["--params", "7B", "--dtype", "bf16", "--store-param-remainders"], "needs master_dtype=torch.float32"),
        (["--params", "7B", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--model", "torch.nn:Linear"], "called without arguments: TypeError: "),
        (["--model", ":small"], "give it as package.module:factory"),
        (["--params", "7e9", "--world-size", "0"], "'0' is no list of numbers of ranks"),
        (["--params", "7e9", "--grad-dtype", "float32"], "by a hook only: give hook=reduce_scatter_hook"),
        (["--params", "7e9", "--world-size", "6", "--shard-size", "4"], "6 ranks are no groups of 4"),
        (["--params", "7e9", "--world-size", "6", "--shard-size", "0"], "'0' is no number of ranks"),
        (["--model", "models"], "give it as package.module:factory"),
        (["--model", "no_such_module:small"], "No module named 'no_such_module'"),
        (["--model", "os:getcwd"], "made a str, not a torch.nn.Module"),
        (["--state-dict", "no.pt"], "No such file"),
        ([], "one of the arguments --params --model --state-dict is required"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = zeroadam_plan(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize(
    "content", [b"", b"nonsense", (10**12).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"]
)
def test_a_file_that_is_no_state_dict(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    done = zeroadam_plan("--state-dict", name, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("zeroadam plan: ")
    assert done.stderr.count("\n") == 1
