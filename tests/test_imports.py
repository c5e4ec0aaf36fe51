"""What an import brings with it, counted in a fresh interpreter."""

import subprocess
import sys

import pytest

# Each takes as long to import as torch itself or half of that, and torch does not import it.
HEAVY = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy", "triton", "bitsandbytes"}


def modules_after(script: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys\n{script}\nprint(*sys.modules, sep='\\n')"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n"))


@pytest.mark.slow
def test_all_that_is_public_brings_torch_and_little_else() -> None:
    """Fewer modules than a fifth of torch's, and none of the heavy ones."""
    public, plain = modules_after("from zeroadam import *"), modules_after("import torch")
    assert {"torch", "zeroadam.optimizer", "zeroadam.plain_file"} <= public
    assert not (public - plain) & HEAVY
    assert len(public - plain) < len(plain) / 5


def test_the_package_alone_brings_no_torch() -> None:
    assert "torch" not in modules_after("import zeroadam\nzeroadam.__version__")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in ("plan", "export", "inspect"))]
)
def test_help_brings_no_torch(arguments: list[str]) -> None:
    script = (
        f"sys.argv = {['zeroadam', *arguments]}\nimport zeroadam.cli\ntry: zeroadam.cli.main()\nexcept SystemExit: pass"
    )
    assert not {"torch", "numpy", "rich"} & modules_after(script)


def test_what_is_public_is_there_and_nothing_else() -> None:
    script = """
import zeroadam
assert set(zeroadam.__all__) <= set(dir(zeroadam))
assert all(getattr(zeroadam, name).__module__.startswith("zeroadam.") for name in zeroadam.__all__)
try: zeroadam.nothing
except AttributeError as error: assert str(error) == "module 'zeroadam' has no attribute 'nothing'"
else: raise AssertionError
"""
    assert "zeroadam.optimizer" in modules_after(script)


def test_nothing_asks_for_a_gpu() -> None:
    """CUDA cannot be used in a process that is forked after that (pytorch#68861)."""
    script = """
import torch
def fail(*_): raise SystemExit("asked for a GPU")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = fail
from zeroadam import *
"""
    assert "zeroadam.optimizer" in modules_after(script)
