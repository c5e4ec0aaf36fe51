"""What the Triton kernel compiles to, without a GPU: registers, spills, and how wide its loads and stores are.

PYTHONPATH=. python launch/kernel_registers.py
"""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zeroadam.update.adam_triton import BLOCK, _kernel
from zeroadam.update.rounding import GOLDEN, HASH

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"table": "*i64", "blocks": "*i32", "grads": "*i64", "scalars": "*fp32"}
FLOATS = dict.fromkeys(["beta1", "beta2", "rest1", "rest2", "eps", "weight_decay"], "fp32")
KINDS = {
    "float32": (tl.float32, tl.float32, ""),
    "bfloat16 + master": (tl.bfloat16, tl.float32, "master"),
    "bfloat16 + remainder, bfloat16 moments": (tl.bfloat16, tl.bfloat16, "remainder"),
}
PLACES = {"at 16 bytes": (True, True), "gradient off": (True, False), "all off": (False, False)}
# Registers of a multiprocessor of these GPUs, and the most warps on it.
REGISTERS, MOST_WARPS = 65536, 64


def compiled(kind: str, place: str, arch: int, warps: int) -> bytes:
    param, moment, kept = KINDS[kind]
    aligned, grad_aligned = PLACES[place]
    constants = {"param_dtype": param, "grad_dtype": param, "moment_dtype": moment, "compute_dtype": tl.float32}
    constants |= {"master": kept == "master", "remainder": kept == "remainder", "amsgrad": False, "maximize": False}
    constants |= {"decoupled": True, "aligned": aligned, "grad_aligned": grad_aligned}
    constants |= {"hash_": HASH, "golden": GOLDEN, "block": BLOCK}
    signature = {**POINTERS, **FLOATS, **dict.fromkeys(constants, "constexpr")}
    places = {(_kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=_kernel, signature=signature, constexprs=places)
    options = {"enable_fp_fusion": True, "num_warps": warps}
    cubin: bytes = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    return cubin


def dump(flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([DUMP, flag, file.name], capture_output=True, text=True, check=True).stdout


def widths(sass: str, instruction: str) -> str:
    """How many there are of each width: "16 x 128, 5 x 32" bits."""
    bits: Counter[int] = Counter()
    for name in re.findall(rf"\b{instruction}\.[\w.]+", sass):
        width = re.search(r"\.(?:[US](8|16)|(64|128))(?:\.|$)", name)
        bits[int(width[1] or width[2]) if width else 32] += 1
    return ", ".join(f"{count} x {width}" for width, count in sorted(bits.items(), reverse=True))


def main() -> None:
    print("| | GPU | pieces begin | warps | registers | spills | warps that fit | loads, bits | stores, bits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind, arch, place, warps in itertools.product(KINDS, (80, 90), PLACES, (4, 8)):
        cubin = compiled(kind, place, arch, warps)
        used = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage", cubin))
        assert used is not None
        sass, registers = dump("-sass", cubin), int(used[1])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass)) + int(used[2])
        fit = min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps) * warps, MOST_WARPS)
        row = (kind, f"sm_{arch}", place, warps, registers, spills, fit, widths(sass, "LDG"), widths(sass, "STG"))
        print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
