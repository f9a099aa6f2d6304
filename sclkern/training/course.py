"""The course of a run in its report: gradient norm, learning rates, throughput, waits and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sclkern.io import write_atomically

Rows = Sequence[Mapping[str, Any]]


def plot_course(rows: Rows, path: Path) -> None:
    """Draw gradient norm, learning rates, pairs a second and the share of a step that waits for data, against the step.

    Args:
        rows: rows of ``metrics.jsonl``.
        path: PNG file to write.
    """
    train = [row for row in rows if row["kind"] == "train"]
    rates = [name for name in ("learning_rate", "learning_rate_fusion", "learning_rate_heads") if _has(train, name)]
    names = {name: name.removeprefix("learning_rate").strip("_") or "encoders" for name in rates}
    panels = {
        "gradient norm": {"": _points(train, "grad_norm")},
        "learning rate": {names[name]: _points(train, name) for name in rates},
        "pairs a second": {"": _points(train, "pairs_per_second")},
        "waiting for data, % of a step": {"": _waits(train)},
    }
    figure = Figure(figsize=(8, 6))
    for axis, (title, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for label, points in lines.items():
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        # Without a bound from above, which one outlier would set, a norm is not readable.
        axis.set_yscale("log" if title == "gradient norm" and any(y > 0 for _, y in lines[""]) else "linear")
        if axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def course_section(rows: Rows) -> list[str]:
    """Lines of the report: medians of throughput and waits, memory, the slowest process, and the plot.

    Args:
        rows: rows of ``metrics.jsonl``.

    Returns:
        Markdown; nothing where no rate is logged.
    """
    # The first step compiles kernels and opens files.
    train = [row for row in rows if row["kind"] == "train" and row["step"] > 1 and row.get("pairs_per_second")]
    if not train:
        return []
    lines = ["## Course", "", "| median of logged steps | |", "|---|---|"]
    lines.append(f"| pairs a second | {_median(train, 'pairs_per_second'):.4g} |")
    if _has(train, "mfu"):
        lines.append(f"| of the device's peak (MFU) | {_median(train, 'mfu'):.1%} |")
    waits = [share for _, share in _waits(train)]
    if waits:
        lines.append(f"| of a step, waiting for data | {statistics.median(waits):.1f} % |")
    if _has(train, "memory_gb"):
        lines.append(f"| memory of a process, at most | {max(row.get('memory_gb') or 0 for row in train):.2f} GB |")
    named = [row for row in train if row.get("slowest_rank") is not None]
    if named:
        most = statistics.mode(int(row["slowest_rank"]) for row in named)
        lag = statistics.median(row["slowest_lag"] for row in named if int(row["slowest_rank"]) == most)
        lines.append(f"| slowest process most often | rank {most}, {lag:.0%} behind the median |")
    return [*lines, "", "![course](course.png)", ""]


def _has(rows: Rows, name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _points(rows: Rows, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _waits(rows: Rows) -> list[tuple[int, float]]:
    return [
        (row["step"], 100 * row["data_seconds"] / row["step_seconds"])
        for row in rows
        if row.get("step_seconds") and row.get("data_seconds") is not None
    ]


def _median(rows: Rows, name: str) -> float:
    return statistics.median(row[name] for row in rows if row.get(name) is not None)
