"""The pictures of `launch/train.py`. A run is what its --json writes."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def one(file: Path, run: dict[str, Any], full: int) -> None:
    """Losses over the steps, and the bytes of state of each rank beside `full`, those of a plain AdamW."""
    held = [state for state, _ in run["state"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=[2, 1], layout="constrained")
    left.plot(range(1, len(run["losses"]) + 1), run["losses"], linewidth=1, alpha=0.6, label="training")
    left.plot(*zip(*run["held_out"], strict=True), marker="o", label="held out")
    left.set(xlabel="step", ylabel="loss, nats per byte", title=f"{run['name']} on {len(held)} ranks")
    left.legend()
    bars = right.bar(["AdamW", *(f"rank {rank}" for rank in range(len(held)))], [b / 2**20 for b in (full, *held)])
    bars[0].set_color("lightgray")
    right.bar_label(bars, fmt="%.1f")
    right.set(ylabel="MiB", title="optimizer state per rank")
    right.tick_params(axis="x", rotation=90 if len(held) > 4 else 0)
    figure.savefig(file, dpi=120)


def several(file: Path, runs: list[dict[str, Any]]) -> None:
    """Held-out losses beside each other, from half of the run on, as they differ little beside where they began."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=[3, 2], layout="constrained")
    for number, run in enumerate(runs):
        half = run["held_out"][len(run["held_out"]) // 2 :]
        left.plot(*zip(*half, strict=True), marker=".", color=f"C{number}")
        name = f"{run['name']}\n{half[-1][1]:.4f} nats"
        bar = right.barh([name], [max(state for state, _ in run["state"]) / 2**20], color=f"C{number}")
        right.bar_label(bar, fmt=" %.1f", padding=1)
    left.set(xlabel="step", ylabel="loss held out, nats per byte")
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="MiB of optimizer state per rank")
    figure.savefig(file, dpi=120)
