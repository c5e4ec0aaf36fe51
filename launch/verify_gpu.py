"""Find out, in a few minutes on a machine with a GPU, whether zeroadam is right and fast there, and write a table.

    PYTHONPATH=. python launch/verify_gpu.py --out verify_gpu.txt

Each check is a process of its own, so that none hangs or breaks the next. W = 1 runs on NCCL, two ranks share one GPU
over gloo, and with several GPUs NCCL runs between them as well. Without a GPU it runs what can run on a CPU.
It exits with 1 if a check has failed.

More than 300 lines, as it is one list of checks that do not depend on each other.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from train import GPT

from zeroadam import ZeroAdamW, plan, reduce_scatter_hook
from zeroadam._compat import grouped
from zeroadam.transport.backend import broadcast_rows, reduce_rows
from zeroadam.update.adam import TRITON

CUDA = torch.cuda.is_available()
LIMIT_SECONDS = 150  # for each check
STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "amsgrad": {"amsgrad": True},
    "master": {"master_dtype": torch.float32},
    "remainder": {"master_dtype": torch.float32, "store_param_remainders": True},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
}


class SkippedError(Exception):
    """There is nothing here on which this could run; the message says what it needs."""


def needs_gpu() -> None:
    if not CUDA:
        raise SkippedError("needs a GPU")


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank % torch.cuda.device_count()) if CUDA else torch.device("cpu")


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


class Net(nn.Module):
    """Even and uneven shapes, a 0-d parameter, and some that are cut along another dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = [(1001, 64), (64, 512), (7,), (), (3, 5), (2, 300), (1, 4096), (512, 512)]
        self.weights = nn.ParameterList([torch.randn(shape) / 10 for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(
            [(w * x.to(w) + w.sin() * i).square().sum().float() for i, w in enumerate(self.weights)]
        ).sum()


def train(
    zero: bool, dtype: torch.dtype = torch.float32, between: Callable[[], None] = lambda: None, **options: Any
) -> tuple[nn.Module, Any]:
    """A few steps with DDP, of ours with the hook or of torch's AdamW."""
    device = device_of(dist.get_rank())
    model = DistributedDataParallel(Net().to(device, dtype), gradient_as_bucket_view=True)
    optimizer: Any = (
        ZeroAdamW(model, lr=1e-2, **options) if zero else torch.optim.AdamW(model.parameters(), 1e-2, **options)
    )
    for step in range(STEPS):
        torch.manual_seed(10 * step + dist.get_rank())
        between()
        model(torch.randn((), device=device)).backward()
        between()
        optimizer.step()
        optimizer.zero_grad()
    wait()
    return model, optimizer


def bits(model: nn.Module) -> str:
    numbers = [param.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes() for param in model.parameters()]
    return hashlib.sha256(b"".join(numbers)).hexdigest()


def furthest(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models, over the largest number in them."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    return max(float((p.float() - q.float()).abs().max() / q.float().abs().max()) for p, q in pairs)


def group_of(world_size: int, function: Callable[..., str], *args: Any, nccl: bool = False) -> str:
    """The answer of rank 0 of a process group that runs a function on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, f"{folder}/store", nccl and CUDA, function, args, f"{folder}/answer")
        torch.multiprocessing.spawn(_rank, arguments, nprocs=world_size)
        return Path(folder, "answer").read_text()


def _rank(
    rank: int, world_size: int, store: str, nccl: bool, function: Callable[..., str], args: Any, answer: str
) -> None:
    torch.set_num_threads(1)
    if CUDA:
        torch.cuda.set_device(device_of(rank))
    dist.init_process_group("nccl" if nccl else "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = function(*args)
    if rank == 0:
        Path(answer).write_text(found)
    dist.barrier()
    time.sleep(0.2)  # see launch/train.py
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- right


def same_as_adamw() -> str:
    """Of one rank bit for bit, with torch's fused kernel; where two sum and cut, with the unfused one."""
    fused = dist.get_world_size() == 1
    ours, plain = train(True, fused=fused)[0], train(False, fused=fused)[0]
    assert bits(ours) == bits(plain), f"differs by {furthest(ours, plain):.1e}"
    ranks: list[Any] = [None] * dist.get_world_size()
    for name, options in OPTIONS.items():
        model, _ = train(True, torch.float32 if name in ("float32", "amsgrad") else torch.bfloat16, **options)
        dist.all_gather_object(ranks, bits(model))
        assert len(set(ranks)) == 1, f"{name}: the ranks differ"
    return f"bit for bit; {len(OPTIONS)} precisions alike on all ranks"


def check_one_rank() -> str:
    return group_of(1, same_as_adamw, nccl=True)


def check_two_ranks_on_one_gpu() -> str:
    return group_of(2, same_as_adamw)


def near_adamw() -> str:
    ours, plain = train(True, fused=False)[0], train(False, fused=False)[0]
    assert furthest(ours, plain) < 1e-5, f"differs by {furthest(ours, plain):.1e}"
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, bits(ours))
    assert len(set(ranks)) == 1, "the ranks differ"
    device, world = device_of(dist.get_rank()), dist.group.WORLD
    assert world is not None
    rows = [torch.full((r + 1,), float(r == dist.get_rank()), device=device) for r in range(dist.get_world_size())]
    for start in (broadcast_rows, reduce_rows):
        for work in start(rows, world):
            work.wait()
    assert float(rows[dist.get_rank()].sum()) == (dist.get_rank() + 1) * dist.get_world_size()
    return f"{furthest(ours, plain):.1e} apart"


def check_nccl_between_gpus() -> str:
    if torch.cuda.device_count() < 2:
        raise SkippedError("needs two GPUs")
    return group_of(torch.cuda.device_count(), near_adamw, nccl=True)


def grouped_collectives() -> str:
    device, ones = device_of(0), [torch.ones(5, device=device_of(0)) for _ in range(3)]
    world = dist.group.WORLD
    assert world is not None
    calls = [lambda t=t, **options: dist.broadcast(t, group_src=0, **options) for t in ones]
    for work in grouped(calls, world, device):
        work.wait()
    assert all(bool((one == 1).all()) for one in ones)
    return "one launch" if world._get_backend(device).supports_coalescing else "one by one"


def check_grouped_collectives() -> str:
    return group_of(1, grouped_collectives, nccl=True)


def check_triton_kernel() -> str:
    """Our own kernel beside torch's fused one."""
    needs_gpu()
    os.environ[TRITON] = "1"
    return group_of(1, triton_beside_fused, nccl=True)


def triton_beside_fused() -> str:
    ours, optimizer = train(True, fused=True)
    assert any(update.for_kernel for some in optimizer._plan.updates for _, update in some), "the kernel did not run"
    plain, _ = train(False, fused=True)
    apart = furthest(ours, plain)
    assert apart < 1e-6, f"differs by {apart:.1e}"
    for name, options in OPTIONS.items():
        train(True, torch.float32 if name in ("float32", "amsgrad") else torch.bfloat16, **options)
    return f"{apart:.1e} from torch's after {STEPS} steps"


def check_triton_kernel_under_compute_sanitizer() -> str:
    needs_gpu()
    if not (sanitizer := shutil.which("compute-sanitizer")):
        raise SkippedError("needs compute-sanitizer")
    command = [sanitizer, "--error-exitcode", "9", sys.executable, __file__, "--check", "triton kernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:]
    return "no errors"


def check_a_device_that_is_not_current() -> str:
    if torch.cuda.device_count() < 2:
        raise SkippedError("needs two GPUs")
    net = Net().to("cuda:1")
    optimizer = ZeroAdamW(net.parameters(), lr=1e-2)
    for triton in ("0", "1"):
        os.environ[TRITON] = triton
        net(torch.ones((), device="cuda:1")).backward()
        optimizer.step()
    wait()
    return "on cuda:1 with cuda:0 current"


def bits_of_a_training(disturbed: bool) -> str:
    """disturbed: by a first rank that is late at random, and a stream of its own."""

    def between() -> None:
        if disturbed and CUDA and dist.get_rank() == 0:
            torch.cuda._sleep(random.randrange(10_000_000))

    with torch.cuda.stream(torch.cuda.Stream()) if disturbed and CUDA else contextlib.nullcontext():
        return bits(train(True, fused=False, between=between)[0])


def check_no_race() -> str:
    """The same bits whatever waits for what: launches that block, a rank that is late, a stream of its own."""
    found = [group_of(2, bits_of_a_training, False), group_of(2, bits_of_a_training, True)]
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    found.append(group_of(2, bits_of_a_training, False))
    assert len(set(found)) == 1, "other bits"
    return "the same bits three times"


def host_never_waits() -> str:
    device = device_of(0)
    model = DistributedDataParallel(Net().to(device), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, lr=1e-2)
    x = torch.ones((), device=device)
    for step in range(5):
        if step == 3:
            torch.cuda.set_sync_debug_mode("error")
        model(x).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    return "no synchronisation in backward, clip and step"


def check_the_host_never_waits() -> str:
    needs_gpu()
    return group_of(1, host_never_waits, nccl=True)


def graphs() -> str:
    """A step alone, and all of a training step, captured once and replayed, beside the same without a graph."""
    device, finals = device_of(0), []
    for whole in (None, False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(device)
        optimizer = ZeroAdamW(net.parameters(), lr=1e-2, capturable=True)
        x = torch.ones(4, 64, device=device)

        def backward(net: nn.Module = net, x: Tensor = x) -> None:
            net(x).square().sum().backward()

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        wait()
        graph = torch.cuda.CUDAGraph()
        if whole is not None:
            with torch.cuda.graph(graph):
                if whole:
                    backward()
                optimizer.step()
                if whole:
                    optimizer.zero_grad(set_to_none=False)
        for _ in range(3):
            if not whole:
                backward()
            if whole is None:
                optimizer.step()
            else:
                graph.replay()
            if not whole:
                optimizer.zero_grad(set_to_none=False)
        wait()
        finals.append(bits(net))
    assert len(set(finals)) == 1, "a replay gives other bits"
    return "the same bits as without"


def check_cuda_graphs() -> str:
    needs_gpu()
    return group_of(1, graphs, nccl=True)


# -------------------------------------------------------------------------------------------------------------- fast


def check_memory_is_that_of_the_plan() -> str:
    needs_gpu()
    return group_of(1, memory, nccl=True)


def memory() -> str:
    device = device_of(0)
    before = torch.cuda.memory_allocated()
    model = DistributedDataParallel(GPT(768, 6, 12, 256).to(device, torch.bfloat16), gradient_as_bucket_view=True)
    optimizer = ZeroAdamW(model, master_dtype=torch.float32)
    for _ in range(3):
        model(torch.zeros(1, 256, dtype=torch.long, device=device)).sum().backward()
        optimizer.step()
    held = torch.cuda.memory_allocated() - before
    planned = plan(model.module.parameters(), 1, master_dtype=torch.float32, hook=reduce_scatter_hook)[0].total
    assert held < 1.1 * planned + 64e6, f"{held / 1e6:.0f} MB held, {planned / 1e6:.0f} planned"
    return f"{held / 1e6:.0f} MB held, {planned / 1e6:.0f} planned"


def median_ms(action: Callable[[], Any], times: int = 20) -> float:
    for _ in range(3):
        action()
    found = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        action()
        wait()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def check_bandwidth() -> str:
    """Of the update of 100 million elements, also where a piece begins off 16 bytes."""
    os.environ["NUMEL"] = str(10**8 if CUDA else 10**6)
    return group_of(1, bandwidth, nccl=True)


def check_bandwidth_of_a_billion() -> str:
    if not CUDA or torch.cuda.get_device_properties(0).total_memory < 40e9:
        raise SkippedError("needs a GPU with 40 GB")
    os.environ["NUMEL"] = str(10**9)
    return group_of(1, bandwidth, nccl=True)


def copy_rate(numel: int, device: torch.device) -> float:
    """GB/s, read and written."""
    source, target = torch.zeros(numel, device=device), torch.zeros(numel, device=device)
    return 8 * numel / median_ms(lambda: target.copy_(source)) / 1e6


def bandwidth() -> str:
    device, numel = device_of(0), int(os.environ.get("NUMEL", "1_000_000"))
    rates = {"copy": copy_rate(numel, device)}
    for shift in (0, 1):
        for warps in (0, 4, 8) if CUDA else (0,):  # of our own kernel, if any
            os.environ[TRITON] = "1" if warps else "0"
            from zeroadam.update import adam

            adam._triton_update.cache_clear()
            if warps:
                adam._triton_update().WARPS = adam._triton_update().WARPS_OFF_16 = warps
            for name, cls in (("AdamW", torch.optim.AdamW), ("ours", ZeroAdamW)):
                if name == "AdamW" and warps:
                    continue
                param = nn.Parameter(torch.zeros(numel + shift, device=device)[shift:])
                param.grad = torch.zeros(numel + shift, device=device)[shift:]
                optimizer = cls([param], fused=True)
                what = f"{name}{f', Triton, {warps} warps' if warps else ''}{', off 16 bytes' if shift else ''}"
                rates[what] = 28 * numel / median_ms(optimizer.step) / 1e6
                del optimizer, param
    return "; ".join(f"{name} {rate:,.0f} GB/s" for name, rate in rates.items())


def check_whole_steps() -> str:
    return group_of(1, whole_steps, nccl=True)


def sides() -> Iterator[tuple[str, Callable[[], None]]]:
    """A training step of DDP + fused AdamW, and of ours."""
    device = device_of(0)
    width, layers, context = (768, 12, 512) if CUDA else (128, 2, 32)
    for name in ("AdamW", "ours"):
        torch.manual_seed(0)
        net = GPT(width, layers, width // 64, context).to(device, torch.bfloat16 if CUDA else torch.float32)
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        optimizer: Any = ZeroAdamW(model) if name == "ours" else torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.zeros(4, context, dtype=torch.long, device=device)

        def step(model: nn.Module = model, optimizer: Any = optimizer, tokens: Tensor = tokens) -> None:
            model(tokens).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        yield name, step


def whole_steps() -> str:
    steps = dict(sides())
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(24):
        for name, step in steps.items():  # in turns, so that whatever else goes on meets both alike
            wait()
            start = time.perf_counter()
            step()
            wait()
            if turn > 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    plain, ours = (statistics.median(times[name]) for name in ("AdamW", "ours"))
    return f"{ours / plain:.3f} of DDP + fused AdamW ({ours:.1f} and {plain:.1f} ms)"


def check_kernels_per_step() -> str:
    needs_gpu()
    return group_of(1, kernels, nccl=True)


def kernels() -> str:
    found = {}
    for name, step in sides():
        for _ in range(3):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            wait()
        found[name] = sum(event.count for event in profile.key_averages())
    return f"{found['ours']} of a whole step, {found['AdamW']} with AdamW"


# ---------------------------------------------------------------------------------------------------------- the table

CHECKS = {
    name.removeprefix("check_").replace("_", " "): found
    for name, found in list(globals().items())
    if name.startswith("check_")
}


def run(name: str) -> tuple[str, str]:
    """How a check ended, and what it says."""
    command = [sys.executable, __file__, "--check", name]
    with tempfile.TemporaryDirectory() as folder:  # for what torch leaves there of ranks that failed
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env={**os.environ, "TMPDIR": folder}
            )
        except subprocess.TimeoutExpired:
            return "FAILED", f"still running after {LIMIT_SECONDS} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok: ", "skipped: "))]
    if done.returncode == 0 and lines:
        result, _, detail = lines[-1].partition(": ")
        return result, detail
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return "FAILED", errors[-1] if errors else f"exit {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("verify_gpu.txt"), help="the table is written to this file")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help="; ".join(CHECKS)
    )
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        try:
            print(f"ok: {CHECKS[args.check]()}")
        except SkippedError as reason:
            print(f"skipped: {reason}")
        return
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    where = torch.cuda.get_device_name() if CUDA else "no GPU"
    lines = [f"torch {torch.__version__}, {where}, {torch.cuda.device_count()} GPUs"]
    print(lines[0], flush=True)
    for name in args.only:
        start = time.perf_counter()
        result, detail = run(name)
        lines.append(f"{result:8} {name:32} {time.perf_counter() - start:5.1f} s  {detail}")
        print(lines[-1], flush=True)
        args.out.write_text("\n".join(lines) + "\n")
    sys.exit(any(line.startswith("FAILED") for line in lines))


if __name__ == "__main__":
    main()
