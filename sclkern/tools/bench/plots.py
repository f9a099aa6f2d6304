"""Plots of records as PNG files, machine by machine; a plot without records is left out."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sclkern.tools.bench.ablations import CASES, METHODS, RECALL_AT, ablation_rows, recall
from sclkern.tools.bench.contrasts import COMPUTED, KINDS, MEMORY, contrast_memory_rows
from sclkern.tools.bench.figures import OURS, seconds_text
from sclkern.tools.bench.report import (
    GROUPS,
    Record,
    bounded_by_roofline,
    decoding_rows,
    grouped_phases,
    memory_rows,
    op_rows,
    ratio_rows,
    step_rows,
)


def write_plots(rows: list[Record], folder: Path) -> list[Path]:
    """Plot time against size, the share of the roofline, the step's phases, how much faster than separate passes it is,
    the pictures a second of a core, the memory of contrastive losses over N, and recalls with parts of the method
    changed.

    Args:
        rows: of ``sclkern.tools.bench.records.read``.
        folder: where the files go; it is made.

    Returns:
        The files, named ``<device>-times.png``, ``-roofline.png``, ``-step.png``, ``-step-ratio.png``,
        ``-decoding.png``, ``-loss-memory.png``, ``-contrast-memory.png`` and ``-ablations.png``. Their comment is the
        ``digest`` of the records that they show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for device, records in sorted(_machines(rows).items()):
        for name, draw in _PLOTS.items():
            figure = draw(records)
            if figure is None:
                continue
            figure.suptitle(f"{device}, commit {', '.join(sorted({row['commit'] for row in records}))}", fontsize=9)
            files.append(folder / f"{device}-{name}.png")
            figure.savefig(files[-1], dpi=80, metadata={"Comment": digest(records)})
            plt.close(figure)
    return files


def digests(rows: list[Record]) -> dict[str, str]:
    """The comment that the plots of each machine must have."""
    return {device: digest(records) for device, records in _machines(rows).items()}


def digest(rows: list[Record]) -> str:
    """A hash of the records in any order."""
    ordered = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(ordered).encode()).hexdigest()


def _machines(rows: list[Record]) -> dict[str, list[Record]]:
    machines: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        if row["case"].startswith(("op/", "step/", "step_ratio/", "decoding/", CASES, MEMORY)):
            machines[row["device"]].append(row)
    return machines


def _times(rows: list[Record]) -> Figure | None:
    """A panel an op: milliseconds over sizes that are numbers, otherwise the baselines' multiples of our time."""
    by_key = op_rows(rows)
    panels: dict[tuple[str, str], dict[str, dict[str, Record]]] = defaultdict(dict)
    for (op, size, dtype, pass_), records in by_key.items():
        # Forward and backward together where both exist.
        # Sizes of more columns than rows are in the table alone: they would be points beside a line over N.
        if any("M" in row["values"] for row in records.values()):
            continue
        if OURS in records and (pass_ == "both" or (op, size, dtype, "both") not in by_key):
            panels[op, dtype][size] = records
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(5 * across, 3.4 * down), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((op, dtype), sizes) in zip(axes.flat, panels.items(), strict=False):
        (_lines if all(size.isdigit() for size in sizes) and len(sizes) > 1 else _bars)(axis, sizes)
        axis.set_title(f"{op}, {dtype}")
        axis.legend(fontsize=7)
    return figure


def _implementations(sizes: dict[str, dict[str, Record]]) -> list[str]:
    return list(dict.fromkeys(name for records in sizes.values() for name in records))


def _lines(axis: Axes, sizes: dict[str, dict[str, Record]]) -> None:
    for name in _implementations(sizes):
        points = sorted((int(size), rows[name]["seconds"] * 1e3) for size, rows in sizes.items() if name in rows)
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=2 if name == OURS else 1, label=name)
    axis.set(xscale="log", yscale="log", xlabel="N", ylabel="ms")
    axis.set_xticks([int(size) for size in sizes], list(sizes))
    axis.set_xticks([], minor=True)


def _bars(axis: Axes, sizes: dict[str, dict[str, Record]]) -> None:
    names = _implementations(sizes)
    for number, name in enumerate(names):
        groups = [(group, rows) for group, rows in enumerate(sizes.values()) if name in rows]
        heights = [rows[name]["seconds"] / rows[OURS]["seconds"] for _, rows in groups]
        axis.bar([group + 0.8 * number / len(names) for group, _ in groups], heights, 0.8 / len(names), label=name)
    labels = [f"{size}\n{seconds_text(rows[OURS]['seconds'])}" for size, rows in sizes.items()]
    axis.set_xticks([group + 0.4 * (1 - 1 / len(names)) for group in range(len(sizes))], labels)
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set(ylabel=f"time / that of {OURS}")


def _roofline(rows: list[Record]) -> Figure | None:
    """Bars: the share of the roofline that sclkern reaches."""
    bars = [
        (" ".join(key), records[OURS]["roofline_fraction"])
        for key, records in op_rows(rows).items()
        if OURS in records and bounded_by_roofline(key[0])
    ]
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(9, 1 + 0.24 * len(bars)), layout="constrained")
    axis.barh([name for name, _ in bars], [share for _, share in bars])
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xlabel="least time by the machine's own rates / measured time")
    return figure


def _step(rows: list[Record]) -> Figure | None:
    """Bars: seconds of a pair in the whole training step, divided into its phases."""
    steps = step_rows(rows)
    if not steps:
        return None
    names = [f"{row['case'].removeprefix('step/')}, {row['rows']} pairs" for row in steps]
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.36 * len(steps)), layout="constrained")
    left = [0.0] * len(steps)
    for group in GROUPS:
        widths = [grouped_phases(row)[group] / row["rows"] for row in steps]
        axis.barh(names, widths, left=left, label=group)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for bar, row in enumerate(steps):
        axis.text(
            row["median_seconds"] / row["rows"],
            bar,
            f" {seconds_text(row['median_seconds'] / row['rows'])}, {row['pairs_per_second']:.3g} pairs/s",
            va="center",
            fontsize=8,
        )
    # Room for the text beside the longest bar.
    axis.set_xlim(0, 1.3 * max(row["median_seconds"] / row["rows"] for row in steps))
    axis.invert_yaxis()
    axis.set(xlabel="seconds of a pair, forward and backward")
    axis.legend(fontsize=7, ncols=len(GROUPS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _step_ratio(rows: list[Record]) -> Figure | None:
    """Bars: how much faster than separate passes the planned step is, beside what FLOPs allow."""
    ratios = ratio_rows(rows)
    if not ratios:
        return None
    names = [row["case"].removeprefix("step_ratio/") for row in ratios]
    figure, axis = plt.subplots(figsize=(6, 1.4 + 0.7 * len(ratios)), layout="constrained")
    for number, (key, label) in enumerate((("ratio", "measured"), ("flops_ratio", "as FLOPs allow"))):
        places = [bar + 0.4 * number for bar in range(len(ratios))]
        bars = axis.barh(places, [row[key] for row in ratios], 0.4, label=label)
        axis.bar_label(bars, fmt=" %.2f", fontsize=8)
    axis.set_yticks([bar + 0.2 for bar in range(len(ratios))], names)
    axis.invert_yaxis()
    axis.set(xlabel="time of separate passes / time of the planned step")
    axis.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _decoding(rows: list[Record]) -> Figure | None:
    """A panel a size of pictures: bars of the pictures a second that a core loads, way by way."""
    cases = decoding_rows(rows)
    if not cases:
        return None
    figure, axes = plt.subplots(len(cases), 1, figsize=(6, 2.4 * len(cases)), layout="constrained", squeeze=False)
    for axis, row in zip(axes.flat, cases, strict=True):
        rates = row["pictures_per_second"]
        bars = axis.barh(list(rates), list(rates.values()))
        axis.bar_label(bars, fmt=" %.3g", fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{row['width']} x {row['height']} to {row['pixels']}", fontsize=9)
    axes[-1, 0].set_xlabel("pictures a second of a core")
    return figure


def _loss_memory(rows: list[Record]) -> Figure | None:
    """Lines: peak memory of the contrastive loss beside its inputs, over N."""
    losses = [row for row in memory_rows(rows) if "M" not in row["values"]]
    if not losses:
        return None
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    lines: dict[str, list[Record]] = defaultdict(list)
    for row in losses:
        lines[f"{row['way']}, {row['dtype']}"].append(row)
    for name, records in lines.items():
        axis.plot([r["values"]["N"] for r in records], [r["peak_bytes"] / 1e6 for r in records], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="N", ylabel="MB beside the inputs")
    numbers = sorted({row["values"]["N"] for row in losses})
    axis.set_xticks(numbers, list(map(str, numbers)))
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=7)
    return figure


def _contrast_memory(rows: list[Record]) -> Figure | None:
    """A panel a kind of loss: peak memory over N, measured as filled points on a line, computed as hollow, dashed."""
    lines = contrast_memory_rows(rows)
    if not lines:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in lines))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.5 * len(kinds), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, kind in zip(axes.flat, kinds, strict=True):
        for (of_kind, way), records in lines.items():
            if of_kind != kind:
                continue
            points = [(row["rows"], row["peak_bytes"] / 1e6, row["source"] == COMPUTED) for row in records]
            measured = [point[:2] for point in points if not point[2]]
            (line,) = axis.plot(
                *(zip(*measured, strict=True) if measured else ((), ())),
                marker="o", linewidth=2 if way == OURS else 1, label=way,
            )  # fmt: skip
            # From the last measured point on.
            computed = [*measured[-1:], *(point[:2] for point in points if point[2])]
            if len(computed) > len(measured[-1:]):
                hollow: dict[str, Any] = {
                    "marker": "o",
                    "markerfacecolor": "white",
                    "linestyle": "--",
                    "color": line.get_color(),
                }
                axis.plot(*zip(*computed, strict=True), zorder=line.get_zorder() - 0.1, linewidth=1, **hollow)
        sizes = sorted({row["rows"] for (of_kind, _), records in lines.items() if of_kind == kind for row in records})
        axis.set(xscale="log", yscale="log", xlabel="N", title=f"{KINDS[kind]} loss")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("MB beside the features, forward and backward\n(hollow: computed, not measured)")
    return figure


def _ablations(rows: list[Record]) -> Figure | None:
    """Held-out recall over steps by each method of ranking: mean and range over seeds."""
    variants = ablation_rows(rows)
    if not variants:
        return None
    figure, axes = plt.subplots(1, len(METHODS), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, method in zip(axes, METHODS, strict=True):
        for row in variants:
            steps = [validation["step"] for validation in row["curves"][0]]
            of_seeds = [[recall(validation, method, RECALL_AT[-1]) for validation in seed] for seed in row["curves"]]
            at_step = list(zip(*of_seeds, strict=True))
            (line,) = axis.plot(steps, [mean(values) for values in at_step], label=row["case"].removeprefix(CASES))
            low, high = [min(values) for values in at_step], [max(values) for values in at_step]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12)
        axis.set(title=f"ordered by {method.upper()}", xlabel="step")
    axes[0].set(ylabel=f"held-out recall at {RECALL_AT[-1]}, both directions, %")
    axes[0].legend(fontsize=8)
    return figure


_PLOTS: dict[str, Callable[[list[Record]], Figure | None]] = {
    "times": _times,
    "roofline": _roofline,
    "step": _step,
    "step-ratio": _step_ratio,
    "decoding": _decoding,
    "loss-memory": _loss_memory,
    "contrast-memory": _contrast_memory,
    "ablations": _ablations,
}
