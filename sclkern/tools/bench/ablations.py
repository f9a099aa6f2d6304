"""Trainings of the demo with parts of the method changed: their held-out recalls."""

from __future__ import annotations

from statistics import mean
from typing import Any

CASES = "training/demo/ablation/"
METHODS = ("itc", "itm")
DIRECTIONS = ("image_to_text", "text_to_image")
# Recalls of the table; the last is plotted.
RECALL_AT = (1, 5)
# A record as JSON; a validation as a training logs it.
Record = dict[str, Any]
Row = dict[str, Any]


def ablation_rows(rows: list[Record]) -> list[Record]:
    """The records of variants, in the order in which they were written."""
    return sorted((row for row in rows if row["case"].startswith(CASES)), key=lambda row: row["time"])


def recall(row: Row, method: str, k: int) -> float:
    """Mean recall of both directions in a validation, in percent."""
    return 100 * mean(row[f"{method}_{direction}_r{k}"] for direction in DIRECTIONS)


def ablation_table(rows: list[Record]) -> str:
    """Held-out recalls at the end of training, mean and range over seeds; "" without records."""
    variants = ablation_rows(rows)
    if not variants:
        return ""
    columns = [f"{method.upper()} R@{k}" for method in METHODS for k in RECALL_AT]
    lines = [f"| trained with | seeds | {' | '.join(columns)} | MLM loss |", f"|{'---|' * (len(columns) + 3)}"]
    for row in variants:
        last = [seed[-1] for seed in row["curves"]]
        cells = [_spread([recall(end, method, k) for end in last], 1) for method in METHODS for k in RECALL_AT]
        cells.append(_spread([end["mlm"] for end in last], 2))
        lines.append(f"| {row['case'].removeprefix(CASES)} | {len(last)} | {' | '.join(cells)} |")
    chance = [f"{recall(variants[0]['curves'][0][-1], 'chance', k):.1f}" for k in RECALL_AT] * len(METHODS)
    return "\n".join([*lines, f"| chance | | {' | '.join(chance)} | |", "", *_first_places(variants)])


def _first_places(variants: list[Record]) -> list[str]:
    """How often either method puts a right answer first, where one is among the candidates that ITM orders."""
    sets = list(variants[0]["final"][0])
    columns = [f"{name}, {method.upper()}" for name in sets for method in METHODS]
    lines = [f"| right answer first, of those among the candidates | {' | '.join(columns)} |"]
    lines.append(f"|{'---|' * (len(columns) + 1)}")
    for row in variants:
        shares = [
            [100 * recall(seed[name], method, 1) / recall(seed[name], method, row["reranked"]) for seed in row["final"]]
            for name in sets
            for method in METHODS
        ]
        lines.append(f"| {row['case'].removeprefix(CASES)} | {' | '.join(_spread(share, 0) for share in shares)} |")
    return lines


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
