"""The Triton kernel does what the CPU does; under Triton's interpreter where there is no GPU."""

import gc
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import at_most
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zeroadam.optimizer
import zeroadam.update.adam
from zeroadam import ZeroAdamW
from zeroadam.update.adam import Update, prepare
from zeroadam.update.block import Scratch
from zeroadam.update.master import join, split
from zeroadam.update.piece import Piece

pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
GROUP: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.99),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "amsgrad": False,
    "maximize": False,
    "foreach": False,
    "capturable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}


@pytest.fixture(scope="module")
def kernel() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setenv("TRITON_INTERPRET", "1")  # read where the kernel is defined, and where it is called
        import zeroadam.update.adam_triton

        yield zeroadam.update.adam_triton


def pieces_of(dtype: torch.dtype, kept: str, moments: torch.dtype, amsgrad: bool) -> list[Piece]:
    """Of several sizes, less and more than a block, with counts of steps of their own."""
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for index, shape in enumerate([(5000,), (3,), (64, 33), (1,), (2048,)]):
        master = torch.randn(shape, generator=generator)
        param = master.to(dtype)
        state = {"step": torch.tensor(float(7 * index)), "exp_avg": torch.randn(shape, generator=generator)}
        state["exp_avg_sq"] = torch.rand(shape, generator=generator)
        if amsgrad:
            state["max_exp_avg_sq"] = torch.rand(shape, generator=generator)
        state = {name: t.to(moments) if t.dim() else t for name, t in state.items()}
        if kept == "master":
            state["master"] = master
            param[::3] = 0.25  # set by somebody else
        elif kept == "remainder":
            state["remainder"] = torch.empty_like(param)
            split(master, param, state["remainder"], torch.empty_like(param, dtype=torch.int32))
        compute = torch.float32 if kept or moments != dtype else dtype
        grad = torch.randn(shape, generator=generator).to(dtype)
        pieces.append(Piece(param, grad, 1 + 2 * (index % 2), state, compute))
    return pieces


def on_device(pieces: list[Piece]) -> list[Piece]:
    device = "cuda" if CUDA else "cpu"
    return [
        Piece(
            piece.param.to(device, copy=True),
            piece.grad.to(device, copy=True),
            piece.divisor,
            {name: tensor.to(device, copy=True) for name, tensor in piece.state.items()},
            piece.compute,
        )
        for piece in pieces
    ]


def step(kernel: Any, pieces: list[Piece], group: dict[str, Any]) -> None:
    for launch in kernel.prepare([pieces], group, [])[0]:
        kernel.update(launch, group)


def step_on_cpu(pieces: list[Piece], group: dict[str, Any]) -> None:
    Update(pieces, group, Scratch(2**14, torch.device("cpu"))).step(group)


def weight_of(piece: Piece) -> Tensor:
    if "remainder" in piece.state:
        return join(piece.param, piece.state["remainder"], torch.empty_like(piece.param, dtype=torch.int32))
    return piece.state.get("master", piece.param)


def assert_close(mine: Tensor, its: Tensor, bound: float, few: float) -> None:
    """Within the bound, but for a few elements, which are within a hundredth."""
    far = ~torch.isclose(mine.float(), its.float(), rtol=bound, atol=bound)
    assert far.sum() <= few
    torch.testing.assert_close(mine[far], its[far], rtol=0.01, atol=0.01)


CASES = [
    (torch.float32, "", torch.float32),
    (torch.bfloat16, "", torch.bfloat16),
    (torch.float16, "", torch.float16),
    (torch.bfloat16, "master", torch.float32),
    (torch.float16, "master", torch.float32),
    (torch.bfloat16, "remainder", torch.float32),
    (torch.float32, "", torch.bfloat16),
    (torch.bfloat16, "remainder", torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("amsgrad", "maximize", "decoupled"), list(itertools.product([False, True], repeat=3)))
def test_the_kernel_does_what_the_cpu_does(
    kernel, case: tuple[torch.dtype, str, torch.dtype], amsgrad: bool, maximize: bool, decoupled: bool
) -> None:
    group = {**GROUP, "amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": decoupled}
    expected = pieces_of(*case, amsgrad)
    found = on_device(expected)
    assert all(kernel.fits(piece, group) for piece in found)
    for _ in range(3):
        step_on_cpu(expected, group)
        step(kernel, found, group)
    dtype, kept, moments = case
    # A few roundings of the dtype in which Adam runs; where a sum nearly cancels, they count against its terms.
    eps = torch.finfo(torch.float32 if kept or moments != dtype else dtype).eps
    for mine, its in zip(on_device(found), expected, strict=True):
        mine = Piece(mine.param.cpu(), mine.grad.cpu(), 1, {k: v.cpu() for k, v in mine.state.items()}, mine.compute)
        assert torch.equal(mine.state["step"], its.state["step"])
        assert torch.equal(mine.grad, its.grad)
        # Of moments that are rounded stochastically, one in many is rounded otherwise for another last bit.
        few = mine.param.numel() / 500 if moments == torch.bfloat16 and mine.compute == torch.float32 else 0
        assert_close(weight_of(mine), weight_of(its), 8 * eps, few)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name in its.state:
                assert_close(mine.state[name], its.state[name], 8 * eps, few)
        if kept:  # the parameter is its rounded master, to the bit
            rounded = torch.empty_like(mine.param)
            if kept == "master":
                rounded = mine.state["master"].to(dtype)
            else:
                split(weight_of(mine), rounded, torch.empty_like(rounded), torch.empty_like(rounded, dtype=torch.int32))
            assert torch.equal(mine.param, rounded)


def test_stochastic_rounding_is_that_of_the_cpu(kernel) -> None:
    """Where Adam's own arithmetic is exact, to the bit."""
    group = {**GROUP, "betas": (0.5, 0.5), "weight_decay": 0.0}
    generator = torch.Generator().manual_seed(0)
    moment = torch.randint(1, 2**7, (5000,), generator=generator).to(torch.bfloat16)
    grad = torch.randint(1, 2**11, (5000,), generator=generator) / 2**9  # 12 + 8 bits are exact in float32
    state = {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment.clone()}
    pieces = [Piece(torch.zeros(5000), grad, 1, state, torch.float32)]
    found = on_device(pieces)
    step_on_cpu(pieces, group)
    step(kernel, found, group)
    rounded = 0
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[0].state[name].cpu(), pieces[0].state[name])
        exact = (moment.float() + (grad if name == "exp_avg" else grad * grad)) / 2
        rounded += int((pieces[0].state[name].float() != exact).sum())
    assert rounded > 1000


def test_what_is_no_number_stays_that(kernel) -> None:
    pieces = pieces_of(torch.bfloat16, "remainder", torch.bfloat16, False)
    pieces[0].grad[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    found = on_device(pieces)
    step(kernel, found, GROUP)
    assert found[0].param[:3].isnan().all()
    assert found[0].state["exp_avg"][0].isnan()
    assert found[0].state["exp_avg"][1:3].tolist() == [math.inf, -math.inf]
    assert found[0].param[3:].isfinite().all()


def test_a_parameter_set_to_zero_goes_on_from_there(kernel) -> None:
    pieces = pieces_of(torch.bfloat16, "remainder", torch.float32, False)
    pieces[0].param.mul_(0)  # of both signs
    assert (pieces[0].state["remainder"].view(torch.int16) < 0).any()
    found = on_device(pieces)
    step(kernel, found, GROUP)
    assert found[0].param.isfinite().all()


def test_what_does_not_fit_is_left_to_torch(kernel) -> None:
    piece = on_device(pieces_of(torch.float32, "", torch.float32, False))[2]
    assert kernel.fits(piece, GROUP)
    assert not kernel.fits(piece, {**GROUP, "fused": False})
    assert not kernel.fits(piece, {**GROUP, "betas": (torch.tensor(0.9), 0.99)})
    piece.grad = piece.grad.t().contiguous().t()
    assert not kernel.fits(piece, GROUP)
    eight = Piece(
        piece.param, piece.param, 1, {"step": piece.state["step"], "exp_avg_8bit": piece.param}, torch.float32
    )
    assert not kernel.fits(eight, GROUP)


COMPILE = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zeroadam.update.adam_triton import _kernel

pointers = {"table": "*i64", "blocks": "*i32", "grads": "*i64", "scalars": "*fp32"}
floats = dict.fromkeys(["beta1", "beta2", "rest1", "rest2", "eps", "weight_decay"], "fp32")
dtypes = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
param, moment, compute, master = sys.argv[1:]
constants = {"param_dtype": dtypes[param], "grad_dtype": dtypes[param], "moment_dtype": dtypes[moment]}
constants |= {"compute_dtype": dtypes[compute], "master": master == "master", "remainder": master == "remainder"}
constants |= {"amsgrad": True, "maximize": True, "decoupled": True, "aligned": True}
constants |= {"hash_": 0x85EBCA6B - 2**32, "golden": 0x9E3779B9 - 2**32, "block": 2048}
signature = {**pointers, **floats, **dict.fromkeys([*constants, "grad_aligned"], "constexpr")}
for constants["grad_aligned"] in (True, False):
    places = {(_kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=_kernel, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert len(compiled.asm["cubin"]) > 0
    print("ld.global.v4" in compiled.asm["ptx"], "ld.global.b16" in compiled.asm["ptx"])
"""


@pytest.mark.parametrize(
    "case",
    ["fp32 fp32 fp32 none", "bf16 fp32 fp32 master", "bf16 bf16 fp32 remainder", "fp16 fp16 fp16 none"],
)
@pytest.mark.slow
def test_it_compiles_for_a_gpu_and_loads_16_bytes_at_a_time(tmp_path: Path, case: str) -> None:
    """No GPU is needed for this: Triton brings the assembler. A gradient off 16 bytes narrows its own loads only."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, *case.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=at_most(60))
    assert done.returncode == 0, done.stderr
    narrow = not case.startswith("fp32")
    assert done.stdout.splitlines() == ["True False", f"True {narrow}"]


@pytest.mark.skipif(not CUDA, reason="there is no GPU")
def test_a_cuda_graph_of_the_kernel(kernel) -> None:
    group = {**GROUP, "lr": torch.tensor(1e-2, device="cuda"), "capturable": True}
    expected, found = (on_device(pieces_of(torch.bfloat16, "master", torch.float32, False)) for _ in range(2))
    step(kernel, found, group)  # the kernel is compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(kernel, found, group)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        step(kernel, expected, group)
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.param, its.param)
        assert torch.equal(mine.state["master"], its.state["master"])


def test_gradients_that_are_allocated_anew_cost_one_small_table(kernel: Any) -> None:
    pieces = on_device(pieces_of(torch.float32, "", torch.float32, False))
    step(kernel, pieces, GROUP)
    before = dict(kernel._TABLES)
    for piece in pieces:
        piece.grad = piece.grad.clone()
    step(kernel, pieces, GROUP)
    added = [key for key in kernel._TABLES if key not in before]
    kinds = {(p.param.numel() % 16 == 0) for p in pieces}  # those that are aligned have tables of their own
    assert 1 <= len(added) <= len(kinds)
    assert all(kernel._TABLES[key] is before[key] for key in before)


@pytest.mark.parametrize("numels", [(1,), (2048,), (2049, 1, 5000), (3, 2048, 4096, 10**6)])
def test_every_block_is_of_one_piece(kernel: Any, numels: tuple[int, ...]) -> None:
    expected = [[i, start] for i, numel in enumerate(numels) for start in range(-(-numel // kernel.BLOCK))]
    assert kernel._blocks(numels).tolist() == expected


def test_tables_of_a_graph_are_kept_as_long_as_the_state_that_it_changes(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_capturing", lambda device: True)  # noqa: ARG005
    before = len(kernel._CAPTURED)
    pieces = on_device(pieces_of(torch.float32, "", torch.float32, False))
    step(kernel, pieces, GROUP)
    assert before < len(kernel._CAPTURED) <= before + 2  # of those that are aligned, and of the others
    kernel._TABLES.clear()
    steps = [piece.state["step"] for piece in pieces]
    pieces.clear()
    gc.collect()
    assert len(kernel._CAPTURED) > before
    steps.clear()
    gc.collect()
    assert len(kernel._CAPTURED) == before


class Count(TorchDispatchMode):
    """The names of the operators that would be launched; views and marks for the profiler are not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and func.namespace != "profiler":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(CUDA, reason="counts what Triton's interpreter does not launch")
def test_launches_beside_the_kernel_do_not_grow_with_pieces_or_kinds(kernel: Any, monkeypatch: Any) -> None:
    """They were 14 for each kind of pieces: two here, as those that begin off 16 bytes are one of their own."""
    monkeypatch.setattr(kernel, "_kernel", {(n,): lambda *_, **__: None for n in range(1, 20)})
    found = []
    for few in (True, False):
        pieces = on_device(pieces_of(torch.float32, "", torch.float32, False))[: 1 if few else None]
        step(kernel, pieces, GROUP)  # its tables are made
        with Count() as count:
            step(kernel, pieces, GROUP)
        found.append(count.names)
    assert found[0] == found[1]
    assert len(found[0]) <= 14


def optimizer_of(bucket_cap_mb: float) -> tuple[ZeroAdamW, list[Tensor]]:
    """Of eight parameters in two param groups, which the kernel is to update."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (3000, 7, 4096, 129) * 2]
    groups = [{"params": params[:5], "weight_decay": 0.1}, {"params": params[5:], "lr": 0.01}]
    return ZeroAdamW(groups, lr=1e-3, fused=True, bucket_cap_mb=bucket_cap_mb), params


@pytest.mark.skipif(CUDA, reason="runs the kernel on CPU tensors, in Triton's interpreter")
def test_launches_beside_the_kernel_do_not_grow_with_buckets(kernel: Any, monkeypatch: Any) -> None:
    """What depends on the counts of steps was computed for every bucket: 14 operators for each."""
    monkeypatch.setattr(zeroadam.update.adam, "_kernel_for", lambda _: kernel)
    launched: list[int] = []
    monkeypatch.setattr(kernel, "_kernel", {(n,): lambda *_, **__: launched.append(1) for n in range(1, 100)})
    found, buckets, launches = [], [], []
    for bucket_cap_mb in (25, 0.001):
        optimizer, params = optimizer_of(bucket_cap_mb)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()  # states and tables are made
        optimizer.step()
        launched.clear()
        with Count() as count:
            optimizer.step()
        found.append(sorted(count.names))
        buckets.append(len(optimizer._plan.buckets))
        launches.append(len(launched))
        assert [float(optimizer.state[param]["step"]) for param in params] == [3.0] * len(params)
    assert buckets[0] < buckets[1]
    assert launches[0] < launches[1]
    assert found[0] == found[1]
    assert found[0].count("aten._foreach_add_.Scalar") == 2  # one for each param group


@pytest.mark.skipif(CUDA, reason="runs the kernel on CPU tensors, in Triton's interpreter")
def test_a_step_prepared_for_all_buckets_has_the_bits_of_one_for_each(kernel: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(zeroadam.update.adam, "_kernel_for", lambda _: kernel)
    found = []
    for together in (True, False):
        if not together:  # every update then prepares for itself
            monkeypatch.setattr(zeroadam.optimizer, "prepare", lambda *_: None)
        optimizer, params = optimizer_of(0.001)
        generator = torch.Generator().manual_seed(1)
        for step_number in range(4):
            for index, param in enumerate(params):  # some without gradients, so that counts differ
                missing = step_number == 1 and index % 2
                param.grad = None if missing else torch.randn(param.shape, generator=generator)
            optimizer.param_groups[0]["lr"] = 1e-3 * (step_number + 1)
            optimizer.step()
        state = [optimizer.state[param][name] for param in params for name in ("step", "exp_avg", "exp_avg_sq")]
        found.append([*params, *state])
    assert len({float(optimizer.state[param]["step"]) for param in params}) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(CUDA, reason="runs the kernel on CPU tensors, in Triton's interpreter")
def test_an_update_of_no_elements_is_counted_once(kernel: Any, monkeypatch: Any) -> None:
    """A bucket of which this rank owns nothing."""
    monkeypatch.setattr(zeroadam.update.adam, "_kernel_for", lambda _: kernel)
    pieces = pieces_of(torch.float32, "", torch.float32, False)[:2]
    pieces[1] = Piece(torch.empty(0), torch.empty(0), 1, {"step": torch.tensor(4.0)}, torch.float32)
    updates = [[(0, Update([piece], GROUP, Scratch(2**14, torch.device("cpu"))))] for piece in pieces]
    for _ in range(2):
        prepare(updates, [GROUP])
        for ((_, update),) in updates:
            update.step(GROUP)
    assert [float(piece.state["step"]) for piece in pieces] == [2.0, 6.0]


@pytest.mark.skipif(CUDA, reason="looks at what would be launched")
def test_a_gradient_off_16_bytes_leaves_the_other_loads_wide(kernel: Any, monkeypatch: Any) -> None:
    """As behind a parameter of odd size in DDP's bucket, and with the bits of one that is aligned."""
    generator = torch.Generator().manual_seed(0)
    param, grad = torch.randn(4096, generator=generator), torch.randn(4097, generator=generator)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn(4096, generator=generator), "exp_avg_sq": param.square()}
    at, off = on_device([Piece(param, grad[1:], 3, state, torch.float32)] * 2)
    off.grad = grad[1:]
    assert off.grad.data_ptr() % 16 != 0
    step(kernel, [at, off], GROUP)
    assert torch.equal(at.param, off.param)
    assert all(torch.equal(at.state[name], off.state[name]) for name in state)

    odd = on_device([Piece(param[:7], grad[:7], 1, {n: t[:7] if t.dim() else t for n, t in state.items()}, at.compute)])
    launched = []
    wide = {(n,): lambda *_, **given: launched.append(given) for n in range(1, 9)}
    monkeypatch.setattr(kernel, "_kernel", wide)
    step(kernel, [at, off, *odd], GROUP)
    chosen = [(given["aligned"], given["grad_aligned"], given["num_warps"]) for given in launched]
    assert chosen == [(True, True, 4), (True, False, 4), (False, False, 8)]
