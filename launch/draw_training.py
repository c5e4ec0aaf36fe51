"""The pictures of `launch/train.py`. A run is what its --json writes.

    python launch/draw_training.py seeds.png RUN.json RUN.json ...

draws runs of the same name, which are those with other seeds, as one line with their spread, and tells their means.
"""

import argparse
import json
import statistics
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


def seeds(file: Path, runs: list[dict[str, Any]]) -> list[str]:
    """Held-out losses of each name: the mean over its runs, and from the least to the most; and the last as text."""
    of_name: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        of_name.setdefault(run["name"], []).append(run)
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    told = []
    for number, (name, alike) in enumerate(of_name.items()):
        steps = [step for step, _ in alike[0]["held_out"]]
        losses = list(zip(*([loss for _, loss in run["held_out"]] for run in alike), strict=True))
        half = len(steps) // 2  # as they differ little beside where they began
        means = [statistics.mean(of_step) for of_step in losses]
        axis.plot(steps[half:], means[half:], marker=".", color=f"C{number}", label=f"{name}: {means[-1]:.4f}")
        least, most = [min(of_step) for of_step in losses], [max(of_step) for of_step in losses]
        axis.fill_between(steps[half:], least[half:], most[half:], color=f"C{number}", alpha=0.15, linewidth=0)
        last = ", ".join(f"{loss:.4f}" for loss in losses[-1])
        told.append(f"{name}: {means[-1]:.4f} nats per byte held out, of {len(alike)} runs: {last}")
    axis.set(xlabel="step", ylabel="loss held out, nats per byte", title=f"mean and spread of {len(runs)} runs")
    axis.legend()
    figure.savefig(file, dpi=120)
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw runs of launch/train.py, those of one name as one line.")
    parser.add_argument("file", type=Path, metavar="FILE.png")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="what --json has written")
    arguments = parser.parse_args()
    print("\n".join(seeds(arguments.file, [json.loads(run.read_text()) for run in arguments.runs])))
