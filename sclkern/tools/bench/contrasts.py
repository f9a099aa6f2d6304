"""Tables of contrastive losses beside those of other libraries: peak memory over N, and time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sclkern.tools.bench.figures import OURS, memory_text, seconds_text

Record = dict[str, Any]

# The prefixes of the cases.
MEMORY, TIME = "contrast_memory/", "contrast/"
# Kinds of losses as tables name them.
KINDS = {
    "clip": "CLIP's",
    "ranking": "ranking",
    "ranking-hard": "ranking, with hard negatives",
}
COMPUTED = "computed"


def contrast_memory_rows(rows: list[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The records of peak memory by (kind, implementation), each over N; sclkern's first."""
    return _by_line(rows, MEMORY)


def _by_line(rows: list[Record], prefix: str) -> dict[tuple[str, ...], list[Record]]:
    lines: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for row in rows:
        if row["case"].startswith(prefix):
            dtype = () if prefix == MEMORY else (row["dtype"],)
            lines[(row["kind"], *dtype, row["way"])].append(row)
    kinds = list(KINDS)

    def position(line: tuple[str, ...]) -> tuple[Any, ...]:
        return kinds.index(line[0]), line[1:-1], line[-1] != OURS, line[-1]

    return {line: sorted(lines[line], key=lambda row: row["rows"]) for line in sorted(lines, key=position)}


def contrast_tables(rows: list[Record]) -> str:
    """Both tables; "" without records."""
    return "\n\n".join(table for table in (contrast_table(rows), contrast_memory_table(rows)) if table)


def contrast_memory_table(rows: list[Record]) -> str:
    """Peak memory beside the features, forward and backward, N by N; "" without records.

    A figure in brackets is computed: what the code allocates under FakeTensorMode.
    """
    lines = contrast_memory_rows(rows)
    if not lines:
        return ""
    sizes = sorted({row["rows"] for records in lines.values() for row in records})
    width = next(iter(lines.values()))[0]["width"]
    table = [
        f"| memory of a loss of N rows, {width} channels | by | {' | '.join(f'N = {n:,}' for n in sizes)} |",
        f"|---|---|{'---|' * len(sizes)}",
    ]
    for (kind, way), records in lines.items():
        by_size = {row["rows"]: row for row in records}
        values = [_peak(by_size.get(n)) for n in sizes]
        table.append(f"| {KINDS[kind]} | {way} | {' | '.join(values)} |")
    if any(row["source"] == COMPUTED for records in lines.values() for row in records):
        table += [
            "",
            "In brackets: computed, as the tensors that its code allocates under FakeTensorMode; not measured.",
        ]
    return "\n".join(table)


def _peak(row: Record | None) -> str:
    if row is None:
        return ""
    text = memory_text(row["peak_bytes"])
    return f"({text})" if row["source"] == COMPUTED else text


def contrast_table(rows: list[Record]) -> str:
    """Time of a forward and backward by sclkern, and the others with their multiple of it; "" without records."""
    lines = _by_line(rows, TIME)
    cases: dict[tuple[str, str, int], dict[str, Record]] = defaultdict(dict)
    for (kind, dtype, way), records in lines.items():
        for row in records:
            cases[kind, dtype, row["rows"]][way] = row
    if not cases:
        return ""
    table = ["| loss, forward and backward | N | dtype | sclkern | others (times ours) |", "|---|---|---|---|---|"]
    for (kind, dtype, size), by_way in cases.items():
        ours = by_way.pop(OURS, None)
        if ours is None:
            continue
        others = (
            f"{way} {seconds_text(row['median_seconds'])} ({row['median_seconds'] / ours['median_seconds']:.2f}x)"
            for way, row in by_way.items()
        )
        time = seconds_text(ours["median_seconds"])
        table.append(f"| {KINDS[kind]} | {size} | {dtype} | {time} | {', '.join(others)} |")
    return "\n".join(table)
