"""What the demo's model reaches on small real tasks, as `make demo-tasks` records it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CASES = "tasks/demo/"
# A record as JSON.
Record = dict[str, Any]


def demo_tasks_table(rows: list[Record]) -> str:
    """The figures of all tasks, and the minutes that each took from its beginning.

    Args:
        rows: records.

    Returns:
        Markdown; "" without records.
    """
    tasks = sorted((row for row in rows if row["case"].startswith(CASES)), key=lambda row: row["time"])
    if not tasks:
        return ""
    table = figures_table([one for row in tasks for one in row["figures"]])
    whole = [row for row in tasks if "seconds" in row]
    times = ", ".join(f"{row['case'].removeprefix(CASES)} {row['seconds'] / 60:.1f}" for row in whole)
    return f"{table}\n\nMinutes: {times}." if times else table


def figures_table(figures: Sequence[Mapping[str, Any]]) -> str:
    """A row for each figure.

    Args:
        figures: with "task", "model", "metric", "percent", "baseline" and "baseline_percent".

    Returns:
        Markdown.
    """
    lines = ["| task | model | metric | % | compared with | % | difference |", "|---|---|---|---|---|---|---|"]
    for one in figures:
        ours, other = one["percent"], one["baseline_percent"]
        named = (one["task"], one["model"], one["metric"], f"{ours:.1f}", one["baseline"])
        lines.append(f"| {' | '.join(named)} | {other:.1f} | {ours - other:+.1f} |")
    return "\n".join(lines)
