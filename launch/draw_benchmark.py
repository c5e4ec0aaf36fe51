"""The pictures of `launch/benchmark.py`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def bars(file: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Ratio of time, bytes sent and peak memory of each implementation, beside each other."""
    rows = sorted(rows, key=lambda row: row["ratio"])
    names = [row["implementation"] for row in rows]
    colors = ["C1" if name.startswith("zeroadam") else "lightgray" for name in names]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.6 + 0.4 * len(rows)), sharey=True, layout="constrained")
    for axis, key, label in zip(
        axes,
        ("ratio", "sent, bytes/param", "peak, MB"),
        ("time per step, of DDP + AdamW(fused)", "bytes sent per parameter and rank", "peak memory per rank, MB"),
        strict=True,
    ):
        spread = [[r["ratio"] - r["p10"] for r in rows], [r["p90"] - r["ratio"] for r in rows]]
        values = [row[key] for row in rows]
        drawn = axis.barh(names, values, color=colors, xerr=spread if key == "ratio" else None, ecolor="gray")
        if key == "ratio":
            axis.axvline(1, color="black", linewidth=0.8)
        axis.bar_label(drawn, fmt="%.2f" if key == "ratio" else "%.1f" if key != "peak, MB" else "%.0f", padding=2)
        axis.margins(x=0.2)
        axis.set(xlabel=label)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


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
