"""Markdown tables of records, and the part of a document that must be what the records say."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from sclkern.bench.workload import PASSES, WORKLOAD
from sclkern.errors import UserError

BEGIN = "<!-- sclkern bench report: begin -->"
END = "<!-- sclkern bench report: end -->"
OURS = "sclkern"


def report(rows: list[dict]) -> str:
    """Tables of the records of ``sclkern.bench.records.read``, machine by machine."""
    machines: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if row["case"].startswith(("op/", "step/", "roofline")):
            machines[row["device"]].append(row)
    parts = [_machine(device, machines[device]) for device in sorted(machines)]
    return "\n\n".join(parts) if parts else "No records."


def _machine(device: str, rows: list[dict]) -> str:
    measured = [row for row in rows if row["case"] != "roofline"]
    commits = sorted({row["commit"] for row in measured or rows})
    versions = sorted({f"{name} {row[name]}" for row in rows for name in ("torch", "triton") if row.get(name)})
    about = [_described(rows), ", ".join(versions), f"commit {', '.join(commits)}"]
    parts = [f"**{device}** ({'; '.join(text for text in about if text)})"]
    roofline = next((row for row in rows if row["case"] == "roofline"), None)
    if roofline:
        rates = ", ".join(f"{t} {r / 1e12:.3g} TFLOP/s" for t, r in roofline["matrix_flops_per_second"].items())
        parts.append(f"Measured rates: copy {roofline['copy_bytes_per_second'] / 1e9:.3g} GB/s; matrix {rates}.")
    parts += [table for table in (_step_table(rows), op_table(rows), memory_table(rows)) if table]
    return "\n\n".join(parts)


def _described(rows: list[dict]) -> str:
    """The machine as the records name it: a GPU with its driver, a processor with the threads that were used."""
    found = set()
    for row in rows:
        if row.get("device_name"):
            found.add(f"{row['device_name']}, driver {row.get('driver_version', 'unknown')}, CUDA {row.get('cuda')}")
        elif row.get("processor"):
            found.add(f"{row['processor']}, {row['threads']} threads")
    return " / ".join(sorted(found))


def seconds_text(seconds: float) -> str:
    """Three digits with s, ms or µs."""
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1 or u == "µs")
    return f"{three_digits(seconds * factor)} {unit}"


def three_digits(number: float) -> str:
    """Rounded to three digits, without an exponent below a million."""
    return f"{float(f'{number:.3g}'):g}"


def op_rows(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """The records of ops by (op, size, dtype, pass), in the workload's order, and in it by way."""
    sizes = list(dict.fromkeys((op, size.name) for op, work in WORKLOAD.items() for size in (*work.gpu, *work.cpu)))
    found: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        if row["case"].startswith("op/"):
            found[row["op"], row["size"], row["dtype"], row["pass"]][row["way"]] = row

    def place(key: tuple) -> tuple:
        op, size, dtype, part = key
        known = sizes.index((op, size)) if (op, size) in sizes else len(sizes)
        return (known, dtype, PASSES.index(part))

    return {key: found[key] for key in sorted(found, key=place)}


def op_table(rows: list[dict]) -> str:
    """Ours, its share of the roofline, and every other with how many times ours it takes; "" without records."""
    lines = []
    for (op, size, dtype, part), ways in op_rows(rows).items():
        ours = ways.get(OURS)
        others = ", ".join(_other(row, ours) for way, row in ways.items() if way != OURS)
        time = seconds_text(ours["seconds"]) if ours else ""
        share = f"{ours['roofline_fraction']:.0%}" if ours and judged(op) else ""
        lines.append(f"| {op} | {size} | {dtype} | {part} | {time} | {share} | {others} |")
    if not lines:
        return ""
    head = (
        "| op | size | dtype | pass | sclkern | of the roofline | others (times ours) |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _other(row: dict, ours: dict | None) -> str:
    notes = [f"{row['seconds'] / ours['seconds']:.2f}x"] if ours else []
    if ours and row["dropout_p"] != ours["dropout_p"]:
        notes.append("no dropout")
    if row.get("without"):
        notes.append(f"no {', '.join(row['without'])}")
    return f"{row['way']} {seconds_text(row['seconds'])}" + (f" ({', '.join(notes)})" if notes else "")


def _step_table(rows: list[dict]) -> str:
    steps = [row for row in rows if row["case"].startswith("step/") and "median_seconds" in row]
    if not steps:
        return ""
    lines = ["| training step | pairs | dtype | median | pairs a second |", "|---|---|---|---|---|"]
    for row in sorted(steps, key=lambda row: (row["rows"], row["case"])):
        rate = f"{row['pairs_per_second']:.3g}" if "pairs_per_second" in row else ""
        name = row["case"].removeprefix("step/")
        lines.append(f"| {name} | {row['rows']} | {row['dtype']} | {seconds_text(row['median_seconds'])} | {rate} |")
    return "\n".join(lines)


def judged(op: str) -> bool:
    """Whether bytes and operations bound the op: a draw of a few kilobytes is bound by its launch."""
    return op not in WORKLOAD or WORKLOAD[op].gradient


def memory_rows(rows: list[dict]) -> list[dict]:
    """The records of the contrastive loss that know their peak memory, forward with backward."""
    found = [r for r in rows if r.get("op") == "completion_loss" and r.get("peak_bytes") and r["pass"] == "both"]
    return sorted(found, key=lambda row: (row["dtype"], row["way"], row["values"]["N"]))


def memory_table(rows: list[dict]) -> str:
    found = memory_rows(rows)
    if not found:
        return ""
    lines = [
        "| contrastive loss, forward and backward | N | dtype | peak memory beside its inputs |",
        "|---|---|---|---|",
    ]
    for row in found:
        lines.append(f"| {row['way']} | {row['values']['N']} | {row['dtype']} | {row['peak_bytes'] / 1e6:.4g} MB |")
    return "\n".join(lines)


def embed(document: str, text: str) -> str:
    """The document with ``text`` between its two markers.

    Raises:
        UserError: it has not exactly one pair of markers, in their order.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise UserError(f"expected {BEGIN} once and {END} once after it, around what the records say")
    before, after = document.split(BEGIN)[0], document.split(END)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def update(file: Path, text: str) -> None:
    """Write ``text`` between the markers of a document.

    Raises:
        UserError: the file does not exist or lacks the markers.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    try:
        file.write_text(embed(file.read_text(), text))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
