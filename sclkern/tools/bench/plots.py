"""Figures of records, as PNG, machine by machine; each only where there are records for it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from sclkern.tools.bench.report import (
    GROUPS,
    OURS,
    grouped_phases,
    judged,
    memory_rows,
    op_rows,
    seconds_text,
    step_rows,
)


def write_plots(rows: list[dict], folder: Path) -> list[Path]:
    """Write what the records allow into ``folder``: time against size, share of the roofline, the step, loss memory.

    Returns:
        The files, named ``<device>-times.png``, ``-roofline.png``, ``-step.png`` and ``-loss-memory.png``. Their
        comment is the ``digest`` of the records that they show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for device, found in sorted(_machines(rows).items()):
        for name, draw in (("times", _times), ("roofline", _roofline), ("step", _step), ("loss-memory", _loss_memory)):
            figure = draw(found)
            if figure is None:
                continue
            figure.suptitle(f"{device}, commit {', '.join(sorted({row['commit'] for row in found}))}", fontsize=9)
            files.append(folder / f"{device}-{name}.png")
            figure.savefig(files[-1], dpi=80, metadata={"Comment": digest(found)})
            plt.close(figure)
    return files


def digests(rows: list[dict]) -> dict[str, str]:
    """What the comment of a machine's pictures must be, by machine."""
    return {device: digest(found) for device, found in _machines(rows).items()}


def digest(rows: list[dict]) -> str:
    ordered = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(ordered).encode()).hexdigest()


def _machines(rows: list[dict]) -> dict[str, list[dict]]:
    machines: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if row["case"].startswith(("op/", "step/")):
            machines[row["device"]].append(row)
    return machines


def _times(rows: list[dict]):
    """A panel for each op: milliseconds over sizes that are numbers, else how many times ours the others take."""
    found = op_rows(rows)
    panels: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for (op, size, dtype, part), ways in found.items():
        # The longest pass there is.
        if OURS in ways and (part == "both" or (op, size, dtype, "both") not in found):
            panels[op, dtype][size] = ways
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


def _names(sizes: dict[str, dict]) -> list[str]:
    return list(dict.fromkeys(way for ways in sizes.values() for way in ways))


def _lines(axis, sizes: dict[str, dict]) -> None:
    for way in _names(sizes):
        points = sorted((int(size), ways[way]["seconds"] * 1e3) for size, ways in sizes.items() if way in ways)
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=2 if way == OURS else 1, label=way)
    axis.set(xscale="log", yscale="log", xlabel="N", ylabel="ms")
    axis.set_xticks([int(size) for size in sizes], list(sizes))
    axis.set_xticks([], minor=True)


def _bars(axis, sizes: dict[str, dict]) -> None:
    names = _names(sizes)
    for number, way in enumerate(names):
        pairs = [(place, ways) for place, ways in enumerate(sizes.values()) if way in ways]
        heights = [ways[way]["seconds"] / ways[OURS]["seconds"] for _, ways in pairs]
        axis.bar([place + 0.8 * number / len(names) for place, _ in pairs], heights, 0.8 / len(names), label=way)
    labels = [f"{size}\n{seconds_text(ways[OURS]['seconds'])}" for size, ways in sizes.items()]
    axis.set_xticks([place + 0.4 * (1 - 1 / len(names)) for place in range(len(sizes))], labels)
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set(ylabel=f"time / that of {OURS}")


def _roofline(rows: list[dict]):
    """Bars: the share of what the machine allows that ours reaches."""
    bars = [
        (" ".join(key), ways[OURS]["roofline_fraction"])
        for key, ways in op_rows(rows).items()
        if OURS in ways and judged(key[0])
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


def _step(rows: list[dict]):
    """Bars: seconds of a pair in the whole training step, cut into its phases."""
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
    for place, row in enumerate(steps):
        axis.text(
            row["median_seconds"] / row["rows"],
            place,
            f" {seconds_text(row['median_seconds'] / row['rows'])}, {row['pairs_per_second']:.3g} pairs/s",
            va="center",
            fontsize=8,
        )
    # Room for what is written beside the longest.
    axis.set_xlim(0, 1.3 * max(row["median_seconds"] / row["rows"] for row in steps))
    axis.invert_yaxis()
    axis.set(xlabel="seconds of a pair, forward and backward")
    axis.legend(fontsize=7, ncols=len(GROUPS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _loss_memory(rows: list[dict]):
    """Lines: peak memory of the contrastive loss beside its inputs, over N."""
    found = memory_rows(rows)
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    lines: dict[str, list[dict]] = defaultdict(list)
    for row in found:
        lines[f"{row['way']}, {row['dtype']}"].append(row)
    for name, records in lines.items():
        axis.plot([r["values"]["N"] for r in records], [r["peak_bytes"] / 1e6 for r in records], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="N", ylabel="MB beside the inputs")
    rows_of = sorted({row["values"]["N"] for row in found})
    axis.set_xticks(rows_of, list(map(str, rows_of)))
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=7)
    return figure
