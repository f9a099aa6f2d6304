"""The ledger of the base model's step against a budget, which a change may not exceed unless it is written again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step import StepConfig
from sclkern.tools.ledger.step import measure

BUDGET = Path(__file__).parents[3] / "benchmarks" / "step_budget.json"
# Preset, frames, rows.
CASES = {
    "images, batch 64": ("base", 1, 64),
    "images, batch 16": ("base", 1, 16),
    "clips, batch 64": ("base_video", 8, 64),
    "clips, batch 16": ("base_video", 8, 16),
}
# What the budget limits.
LIMITED = ("triton", "torch", "bytes")
TORCH = ".".join(torch.__version__.split(".")[:2])


def figures(cases: Iterable[str] = tuple(CASES)) -> dict[str, dict[str, int]]:
    """Measure cases: the planned step with its default options and negatives from the data set, under autocast.

    Args:
        cases: names of ``CASES``.

    Returns:
        By case the fields of ``counting.totals``.
    """
    found = {}
    for name in cases:
        preset, frames, rows = CASES[name]
        objectives = ObjectiveConfig(itm_negatives="dataset")
        whole = measure(SCLConfig.preset(preset), objectives, StepConfig(), rows=rows, num_frames=frames)["step"]
        found[name] = {key: whole[key] for key in (*LIMITED, "arithmetic_bytes")}
    return found


def read(file: Path = BUDGET) -> dict[str, Any]:
    """The budget of a file: "torch", the version it was written with; "cases"; and "before", cases to compare with."""
    budget: dict[str, Any] = json.loads(file.read_text())
    return budget


def write(found: dict[str, dict[str, int]], file: Path = BUDGET) -> None:
    """Write a budget, and keep what a file says of the time before.

    Args:
        found: of ``figures``.
        file: a budget, rewritten.
    """
    budget = read(file) | {"torch": TORCH, "cases": found}
    file.write_text(json.dumps(budget, indent=1) + "\n")


def check(found: dict[str, dict[str, int]], budget: dict[str, Any]) -> list[str]:
    """Compare with a budget.

    Args:
        found: of ``figures``.
        budget: of ``read``.

    Returns:
        A line for each figure above the budget; of another version of torch, whose operators are cut otherwise, only
        for what is 2 % above it.
    """
    slack = 1.0 if budget["torch"] == TORCH else 1.02
    return [
        f"{case}: {key} {figures[key]:,}, the budget has {budget['cases'][case][key]:,}"
        for case, figures in found.items()
        for key in LIMITED
        if figures[key] > slack * budget["cases"][case][key]
    ]


def format_comparison(found: dict[str, dict[str, int]], budget: dict[str, Any]) -> str:
    """A table of every case, with its shares of the time before.

    Args:
        found: of ``figures``.
        budget: of ``read``.

    Returns:
        Lines of text.
    """
    before = budget["before"]
    lines = [f"{'':18}{'Triton':>8}{'torch':>8}{'GB':>9}   of launches and bytes at {before['commit']}"]
    for case, now in found.items():
        then = before["cases"][case]
        launches = (now["triton"] + now["torch"]) / (then["triton"] + then["torch"])
        moved = now["bytes"] / then["bytes"]
        lines.append(
            f"{case:18}{now['triton']:8}{now['torch']:8}{now['bytes'] / 1e9:9.1f}   {launches:.0%}, {moved:.0%}"
        )
    return "\n".join(lines)
