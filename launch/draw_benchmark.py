"""The pictures of `launch/benchmark.py`; of what its --json has written, they are drawn again by

python launch/draw_benchmark.py docs/benchmark.png docs/measured/benchmark-71.2M.json docs/measured/benchmark-10.8M.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

OURS, OTHERS = "C1", "lightgray"


def bars(file: Path, runs: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Of each run, a title and its rows: ratio of time, bytes exchanged and peak memory of each implementation."""
    runs = [(title, [row for row in rows if row["peak, MB"] != ""]) for title, rows in runs]  # without the limits
    heights = [0.4 * len(rows) + 0.9 for _, rows in runs]
    figure = pyplot.figure(figsize=(12, sum(heights) + 0.3), layout="constrained")
    for part, (title, rows) in zip(_parts(figure, heights), runs, strict=True):
        rows = sorted(rows, key=lambda row: row["ratio"])
        time, exchanged, peak = part.subplots(1, 3, sharey=True)
        names = [row["implementation"] for row in rows]
        colors = [OURS if name.startswith("zeroadam") else OTHERS for name in names]

        ratios = [row["ratio"] for row in rows]
        spread = [[row["ratio"] - row["p10"] for row in rows], [row["p90"] - row["ratio"] for row in rows]]
        time.barh(names, ratios, color=colors, xerr=spread, ecolor="gray")
        time.axvline(1, color="black", linewidth=0.8)
        for name, row in zip(names, rows, strict=True):
            time.annotate(f"{row['ratio']:.2f}", (row["p90"], name), (3, 0), textcoords="offset points", va="center")
        time.set(xlabel="time per step over that of ddp + adamw")

        sent = [row["sent, bytes/param"] for row in rows]
        shared = [row["shared, bytes/param"] for row in rows]
        exchanged.barh(names, sent, color=colors)
        through = exchanged.barh(names, shared, left=sent, color=colors, hatch="////", edgecolor="white", linewidth=0)
        exchanged.bar_label(through, [f"{a + b:.1f}" for a, b in zip(sent, shared, strict=True)], padding=3)
        exchanged.set(xlabel="bytes exchanged per parameter and rank")
        if any(shared):
            hatched = Patch(facecolor=OURS, hatch="////", edgecolor="white", label="through shared memory")
            exchanged.legend(handles=[Patch(color="gray", label="through sockets"), hatched], loc="upper right")

        peak.bar_label(peak.barh(names, [row["peak, MB"] for row in rows], color=colors), fmt="%.0f", padding=3)
        peak.set(xlabel="peak memory per rank, MB (10⁶ bytes)")

        time.invert_yaxis()
        for axis in (time, exchanged, peak):
            _plain(axis)
        # Not by a margin, which bars of no width would stop; and room for the legend beside the short bars at the top.
        exchanged.set_xlim(0, (1.6 if any(shared) else 1.2) * (max(map(sum, zip(sent, shared, strict=True))) or 1))
        part.suptitle(", ".join(title.split(", ")[:2]), weight="bold")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def written(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """The title and the rows that --json has written to a file."""
    run = json.loads(file.read_text())
    return run["title"], run["rows"]


def _parts(figure: Any, heights: list[float]) -> list[Any]:
    return list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _plain(axis: Axes) -> None:
    axis.margins(x=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def growth(file: Path, rows: list[dict[str, Any]]) -> None:
    """Over the number of parameters, a line for each W: time per step, CPU time of step() and memory per rank."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, key, label, unit in zip(
        axes,
        ("wall", "CPU of step", "peak"),
        ("time per step, ms", "CPU time of step() per rank, ms", "peak memory per rank, MB"),
        (1000, 1000, 1e-6),
        strict=True,
    ):
        for world_size in sorted({row["ranks"] for row in rows}):
            line = [(row["parameters"] / 1e6, unit * row[key]) for row in rows if row["ranks"] == world_size]
            axis.plot(*zip(*line, strict=True), marker=".", label=f"W = {world_size}")
        axis.set(xscale="log", yscale="log", xlabel="parameters, millions", ylabel=label)
        low, high = min(row["parameters"] for row in rows) / 1e6, max(row["parameters"] for row in rows) / 1e6
        top = max(unit * row[key] for row in rows)
        axis.plot([low, high], [top * low / high, top], color="lightgray", linestyle="--", label="linear")
        axis.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    picture, *files = map(Path, sys.argv[1:])
    bars(picture, [written(file) for file in files])
