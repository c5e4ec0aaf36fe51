"""What the pictures of docs/ show, read from SVGs, in which matplotlib leaves each text as a comment."""

import re
from pathlib import Path
from typing import Any

import draw_benchmark
import draw_training
import torch

from zeroadam.cli.plan import draw
from zeroadam.memory_plan import RankBytes


def texts(file: Path) -> list[str]:
    return re.findall("<!-- (.*?) -->", file.read_text())


def row(name: str, sent: float, shared: float, peak: float | str = 100.0) -> dict[str, Any]:
    return {
        "implementation": name,
        "ratio": 0.9,
        "p10": 0.8,
        "p90": 1.1,
        "sent, bytes/param": sent,
        "shared, bytes/param": shared,
        "peak, MB": peak,
    }


def test_bytes_through_shared_memory_count_and_are_marked(tmp_path: Path) -> None:
    """A run beside another one, the limits left out, and of each implementation the sum of both kinds of bytes."""
    own = [row("ddp + adamw", 4.0, 0.0), row("zeroadam", 4.0, 2.25), row("limit: a copy", 0.0, 0.0, "")]
    runs = [("10.8 M parameters, 2 ranks, 30 steps", own), ("71.2 M parameters, 2 ranks, 20 steps", own[:1])]
    draw_benchmark.bars(tmp_path / "bars.svg", runs)
    found = texts(tmp_path / "bars.svg")
    assert {"10.8 M parameters, 2 ranks", "71.2 M parameters, 2 ranks", "zeroadam"} <= {*found}
    assert {"6.2", "4.0"} <= {*found}  # 4 + 2.25 bytes, and AdamW's
    assert "limit: a copy" not in found
    assert found.count("through shared memory") == 1  # for the run in which something went through it
    assert "<pattern" in (tmp_path / "bars.svg").read_text()


def test_seeds_of_one_kind_are_one_line_in_a_band(tmp_path: Path) -> None:
    runs = [
        {"name": name, "seed": seed, "held_out": [(0, 5.0), (10, end + seed)], "state": [(2_500_000, 0)]}
        for name, end in (("zeroadam, float32", 1.0), ("zeroadam, bfloat16", 1.5))
        for seed in range(3)
    ]
    draw_training.several(tmp_path / "several.svg", runs)
    found = texts(tmp_path / "several.svg")
    assert {"float32", "bfloat16", "2.0000 at the end", "2.5000 at the end", "2.5"} <= {*found}  # means, and MB
    assert any("least to most of 3 seeds" in text for text in found)
    assert (tmp_path / "several.svg").read_text().count("FillBetweenPolyCollection") == 4  # two kinds in two panels


def test_the_limit_of_a_plan_has_a_colour_of_its_own(tmp_path: Path) -> None:
    ranks = [RankBytes(*[10**9] * 7)]
    colors = {}
    for hbm in (None, 3e9):
        draw(tmp_path / "plan.svg", [(ranks, 4 * 10**9, [5 * 10**9])], hbm, "")
        colors[hbm] = {*re.findall("#[0-9a-f]{6}", (tmp_path / "plan.svg").read_text())}
    assert len(colors[3e9] - colors[None]) == 1
    assert "limit: 3 GB" in texts(tmp_path / "plan.svg")


def test_a_plain_run_is_drawn_in_the_units_of_the_others(tmp_path: Path) -> None:
    run = {"name": "zeroadam", "losses": [2.0, 1.0], "held_out": [(0, 3.0), (2, 1.0)], "state": [(2_500_000, 0)]}
    draw_training.one(tmp_path / "one.svg", run, torch.float32.itemsize * 10**6)
    assert {"MB", "2.5", "4.0"} <= {*texts(tmp_path / "one.svg")}
