"""The command that is run first on a new GPU; what of it can run on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

from patience import at_most

ROOT = Path(__file__).parents[2]


def verify(out: Path, *checks: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """From the bare tree, as on a machine where nothing is installed."""
    command = [sys.executable, ROOT / "launch/verify_gpu.py", "--out", out, "--only", *checks]
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=at_most(100), env=variables)


def test_what_runs_and_what_is_skipped_is_in_the_table(tmp_path: Path) -> None:
    out = tmp_path / "table.txt"
    done = verify(out, "two ranks on one gpu", "cuda graphs")
    assert done.returncode == 0, done.stdout + done.stderr
    head, ran, skipped = out.read_text().splitlines()
    assert head.endswith("no GPU, 0 GPUs")
    assert ran.startswith("ok       two ranks on one gpu")
    assert ran.endswith("bit for bit; 5 precisions alike on all ranks")
    assert skipped.startswith("skipped  cuda graphs")
    assert skipped.endswith("needs a GPU")


def test_a_check_that_fails_is_named(tmp_path: Path) -> None:
    site = tmp_path / "sitecustomize.py"  # as if a step left the parameters as they were
    site.write_text("import zeroadam\nzeroadam.ZeroAdamW.step = lambda self: None\n")
    out = tmp_path / "table.txt"
    done = verify(out, "two ranks on one gpu", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert out.read_text().splitlines()[1].startswith("FAILED   two ranks on one gpu")
    assert "AssertionError: differs by" in out.read_text()


def test_wrong_arguments_are_refused_before_anything_runs(tmp_path: Path) -> None:
    done = verify(tmp_path / "nowhere" / "table.txt", "two ranks on one gpu")
    assert done.returncode == 2
    assert "there is no folder" in done.stderr.splitlines()[-1]
    done = verify(tmp_path / "table.txt", "everything")
    assert done.returncode == 2
    assert "invalid choice: 'everything'" in done.stderr
