"""The pictures of `launch/train.py`. A run is what its --json writes. Losses in nats per byte, sizes in MB.

python launch/draw_training.py docs/precision.png docs/measured/precision-*.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes


def one(file: Path, run: dict[str, Any], full: int) -> None:
    """Losses over the steps, and the bytes of state of each rank beside `full`, those of a plain AdamW."""
    held = [state for state, _ in run["state"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=[2, 1], layout="constrained")
    left.plot(range(1, len(run["losses"]) + 1), run["losses"], linewidth=1, alpha=0.6, label="training")
    left.plot(*zip(*run["held_out"], strict=True), marker="o", label="held out")
    left.set(xlabel="step", ylabel="loss, nats per byte", title=f"{run['name']} on {len(held)} ranks")
    left.legend()
    bars = right.bar(["AdamW", *(f"rank {rank}" for rank in range(len(held)))], [b / 1e6 for b in (full, *held)])
    bars[0].set_color("lightgray")
    right.bar_label(bars, fmt="%.1f")
    right.set(ylabel="MB", title="optimizer state per rank")
    right.tick_params(axis="x", rotation=90 if len(held) > 4 else 0)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _common(curves: list[dict[int, float]]) -> list[int]:
    """The steps after which all runs have looked at their loss; runs may be of different lengths."""
    return sorted(set.intersection(*map(set, curves)))


def several(file: Path, runs: list[dict[str, Any]]) -> None:
    """Held-out losses from step 0, what they are above those of the first kind, and bytes of state per rank.

    Runs of one name and of several seeds are one line, their mean, in a band from the least to the most of them. Losses
    of different kinds are compared with those of the same seed.
    """
    kinds: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        kinds.setdefault(run["name"], {})[run.get("seed", 0)] = run
    first = next(iter(kinds.values()))
    figure, (loss, above, size) = pyplot.subplots(1, 3, figsize=(15, 4.2), width_ratios=[3, 4, 3], layout="constrained")
    for number, (name, seeds) in enumerate(kinds.items()):
        color = f"C{number}"
        curves = {seed: dict(run["held_out"]) for seed, run in seeds.items()}
        steps = _common(list(curves.values()))
        _band(loss, steps, [[curve[step] for step in steps] for curve in curves.values()], color)
        pairs = [(curves[seed], dict(first[seed]["held_out"])) for seed in curves if seed in first]
        if pairs:
            steps = _common([curve for pair in pairs for curve in pair])
            _band(above, steps, [[one[step] - other[step] for step in steps] for one, other in pairs], color)
        final = statistics.mean(curve[max(curve)] for curve in curves.values())
        held = max(state for state, _ in next(iter(seeds.values()))["state"]) / 1e6
        bar = size.barh([f"{name.removeprefix('zeroadam, ')}\n{final:.4f} at the end"], [held], color=color)
        size.bar_label(bar, fmt="%.1f", padding=3)
    most = max(len(seeds) for seeds in kinds.values())
    of_seeds = f" (line: mean, band: least to most of {most} seeds)" if most > 1 else ""
    loss.set(xlabel="step", ylabel="loss held out, nats per byte")
    above.set(xlabel="step", ylabel=f"above {next(iter(kinds)).removeprefix('zeroadam, ')}, same seed, nats per byte")
    size.invert_yaxis()
    size.margins(x=0.2)
    size.set(xlabel="MB (10⁶ bytes) of optimizer state per rank")
    size.tick_params(axis="y", length=0)
    figure.suptitle(f"the bars' colours are those of the lines{of_seeds}", fontsize="medium")
    for axis in (loss, above, size):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _band(axis: Axes, steps: list[int], curves: list[list[float]], color: str) -> None:
    """The mean of some curves in a band from the least to the most of them."""
    at = list(zip(*curves, strict=True))
    axis.plot(steps, [statistics.mean(values) for values in at], color=color, marker=".")
    axis.fill_between(steps, [min(values) for values in at], [max(values) for values in at], color=color, alpha=0.15)


if __name__ == "__main__":
    picture, *files = map(Path, sys.argv[1:])
    runs_on_file = [json.loads(file.read_text()) for file in files]
    several(picture, sorted(runs_on_file, key=lambda run: run["name"] != "zeroadam, float32"))
