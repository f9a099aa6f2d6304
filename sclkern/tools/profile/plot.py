"""The plot of a profile."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

# Share of a step below which a span has no room for its name.
_NARROW = 0.045


def plot_profile(spans: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the step of median length on the host by phase, and below it the share of each phase in all steps.

    Args:
        spans: from ``sclkern.profiling.phase_spans``.
        rows: from ``sclkern.profiling.phase_table``.
        path: PNG file to write.
    """
    steps = [span for span in spans if span["phase"] == "step"]
    median = statistics.median_low(span["seconds"] for span in steps)
    step = next(span for span in steps if span["seconds"] == median)
    end = step["start"] + step["seconds"]
    inside = [span for span in spans if step["start"] <= span["start"] < end]
    # A phase has the same colour in both parts, and so do all fusion layers.
    names = list(dict.fromkeys(_kind(name) for name in (row["phase"] for row in rows)))
    colors = {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)} | {"step": "lightgrey"}

    figure = Figure(figsize=(10, 3.2 + 0.24 * len(rows)), layout="constrained")
    line, bars = figure.subplots(2, 1, height_ratios=[1.6, 0.24 * len(rows) + 0.6])
    for span in inside:
        start, width = 1e3 * (span["start"] - step["start"]), 1e3 * span["seconds"]
        line.barh(-span["depth"], width, left=start, color=colors[_kind(span["phase"])], edgecolor="white", lw=0.5)
        if span["seconds"] > _NARROW * median:
            label = span["phase"].removeprefix("fusion ").replace(" ", "\n")
            line.text(start + width / 2, -span["depth"], label, ha="center", va="center", fontsize=7)
    line.set(
        title="the step of median length; phases below the ones that contain them", xlabel="ms on the host", yticks=[]
    )
    line.set_xlim(0, 1e3 * median)
    unit = "seconds" if rows[0]["device_seconds"] is None else "device_seconds"
    values = [1e3 * row[unit] / len(steps) for row in rows]
    bars.barh([row["phase"] for row in rows], values, color=[colors[_kind(row["phase"])] for row in rows])
    bars.invert_yaxis()
    bars.set(xlabel=f"ms a step on the {'host' if unit == 'seconds' else 'device'}, without the phases inside")
    for side in ("top", "right"):
        bars.spines[side].set_visible(False)
        line.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)


def _kind(name: str) -> str:
    return "fusion layer" if name.startswith("fusion layer ") else name
