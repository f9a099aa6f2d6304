"""What a task found, in percent, beside what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import NamedTuple

DIRECTIONS = ("image_to_text", "text_to_image")


class Figure(NamedTuple):
    """A figure of a task.

    Attributes:
        task: and its data.
        model: that was measured.
        metric: of the figure.
        percent: the figure.
        baseline: what it is compared with.
        baseline_percent: the same metric of the baseline.
    """

    task: str
    model: str
    metric: str
    percent: float
    baseline: str
    baseline_percent: float


def recall(values: Mapping[str, float], method: str, k: int = 1) -> float:
    """Mean recall of both directions, in percent.

    Args:
        values: metrics of an evaluation.
        method: "itc", "rank" or "chance".
        k: rank up to which an answer counts.

    Returns:
        The recall.
    """
    return 100 * mean(values[f"{method}_{direction}_r{k}"] for direction in DIRECTIONS)
