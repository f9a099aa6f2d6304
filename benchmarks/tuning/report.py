"""What records of tuning say."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

# A change is proposed at this ratio or below, if the quartiles do not overlap.
MAX_COST_RATIO = 0.97


def report(rows: list[dict[str, Any]]) -> str:
    """Present and best of every choice, then in words what to change; from records of ``records.read``."""
    choices: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["case"].startswith("tune/"):
            choices[row["device"], row["op"], row["size"], row["pass"], row["choice"]].append(row)
    if not choices:
        return "No records of tuning."
    lines = ["| op | size | pass | choice | present µs | floor | best | µs | ratio | predicted | tried |"]
    lines.append("|" + "---|" * 11)
    advice, bad = [], []
    for (_, op, size, pass_, choice), group in choices.items():
        measured = [row for row in group if row["outcome"] == "measured"]
        bad += [f"- {row['case']}: {row['outcome']}, {row['problem']}" for row in group if row not in measured]
        present = next((row for row in measured if row["config"] == "present"), None)
        others = [row for row in measured if row is not present]
        if present is None or not others:
            continue
        best = min(others, key=lambda row: row["ratio"])
        cells = [op, size, pass_, choice, f"{present['seconds'] * 1e6:.1f}", f"{present['roofline_fraction']:.0%}"]
        cells += [best["config"], f"{best['seconds'] * 1e6:.1f}", f"{best['ratio']:.2f}", f"{best['predicted']:.2f}"]
        lines.append(f"| {' | '.join([*cells, str(len(others))])} |")
        apart = best["device_quartiles"][2] < present["device_quartiles"][0]
        where = f"{op} {size} {pass_}"
        if best["ratio"] <= MAX_COST_RATIO and apart:
            kernels = " and ".join(best["sets"])
            advice.append(
                f"- {where}: {best['config']} for {kernels} in kernels/config_tables.py "
                f"({1 - best['ratio']:.0%} less time)"
            )
        else:
            advice.append(f"- {where}, {choice}: keep the present one (the best other takes {best['ratio']:.2f} of it)")
    parts = ["\n".join(lines), "To change:\n" + "\n".join(advice)]
    return "\n\n".join(parts + (["Not timed:\n" + "\n".join(bad)] if bad else []))
