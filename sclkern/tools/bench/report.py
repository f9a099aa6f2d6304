"""Markdown tables of records, and the part of a document that must be what the records say."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from sclkern.errors import UserError
from sclkern.tools.bench.workload import PASSES, WORKLOAD

# The words between "begin" and "-->" choose the tables, all of them if there are none.
BEGIN = re.compile(r"<!-- sclkern bench report: begin((?: [a-z]+)*) -->")
END = "<!-- sclkern bench report: end -->"
TABLES = ("step", "models", "training", "ops", "memory")
OURS = "sclkern"
# What a picture of the step shows as one: all layers of the fusion encoder, all losses, and what is no phase.
GROUPS = ("image encoder", "text encoder", "fusion", "losses", "backward", "other")


def report(rows: list[dict], tables: tuple[str, ...] = TABLES) -> str:
    """Tables of the records of ``sclkern.tools.bench.records.read``, machine by machine."""
    machines: dict[str, list[dict]] = defaultdict(list)
    cases = {"step": "step/", "models": "model/", "training": "training/", "ops": "op/", "memory": "op/"}
    wanted = (*(cases[table] for table in tables), *(["roofline"] if "ops" in tables else []))
    for row in rows:
        if row["case"].startswith(wanted):
            machines[row["device"]].append(row)
    parts = [text for device in sorted(machines) if (text := _machine(device, machines[device], tables))]
    return "\n\n".join(parts) if parts else "No records."


def _machine(device: str, rows: list[dict], tables: tuple[str, ...]) -> str:
    measured = [row for row in rows if row["case"] != "roofline"]
    commits = sorted({row["commit"] for row in measured or rows})
    versions = sorted({f"{name} {row[name]}" for row in rows for name in ("torch", "triton") if row.get(name)})
    about = [_described(rows), ", ".join(versions), f"commit {', '.join(commits)}"]
    parts = [f"**{device}** ({'; '.join(text for text in about if text)})"]
    roofline = next((row for row in rows if row["case"] == "roofline"), None)
    if roofline:
        rates = ", ".join(f"{t} {r / 1e12:.3g} TFLOP/s" for t, r in roofline["matrix_flops_per_second"].items())
        parts.append(f"Measured rates: copy {roofline['copy_bytes_per_second'] / 1e9:.3g} GB/s; matrix {rates}.")
    made = {
        "step": _step_table,
        "models": _models_table,
        "training": _training_table,
        "ops": op_table,
        "memory": memory_table,
    }
    shown = [table for name in tables if (table := made[name](rows))]
    # A record of something else, such as the comparison of encodings, shows nothing.
    return "\n\n".join([*parts, *shown]) if shown or roofline else ""


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
        # A size of a GPU may be one of a CPU too: those of an op stay together, and numbers in their order.
        first = next((i for i, (other, _) in enumerate(sizes) if other == op), len(sizes))
        return (first, int(size) if size.isdigit() else known, dtype, PASSES.index(part))

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


def step_rows(rows: list[dict]) -> list[dict]:
    """The records of whole steps, by batch and name."""
    return sorted((r for r in rows if r["case"].startswith("step/")), key=lambda row: (row["rows"], row["case"]))


def grouped_phases(row: dict) -> dict[str, float]:
    """Seconds of a step's record by ``GROUPS``: the shares of one step that was profiled, of the median."""
    found = dict.fromkeys(GROUPS, 0.0)
    for name, share in row.get("phases", {}).items():
        group = "losses" if name.startswith("loss ") else "fusion" if name.startswith("fusion") else name
        found[group if group in found else "other"] += share * row["median_seconds"]
    return found


def _step_table(rows: list[dict]) -> str:
    steps = step_rows(rows)
    if not steps:
        return ""
    lines = [
        "| training step | pairs | dtype | median | pairs a second | activations |",
        "|---|---|---|---|---|---|",
    ]
    for row in steps:
        name = row["case"].removeprefix("step/")
        held = f"{row['activation_bytes'] / 1e9:.3g} GB" if "activation_bytes" in row else ""
        values = seconds_text(row["median_seconds"]), f"{row['pairs_per_second']:.3g}", held
        lines.append(f"| {name} | {row['rows']} | {row['dtype']} | {' | '.join(values)} |")
    return "\n".join(lines)


def _models_table(rows: list[dict]) -> str:
    models: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["case"].startswith("model/"):
            key = row["model"], row["layers"], row["rows"], row["dtype"]
            models[key][row["way"]] = row["median_seconds"]
    found = {key: times for key, times in sorted(models.items()) if len(times) == 2}
    if not found:
        return ""
    lines = [
        "| model of transformers | layers | pairs | dtype | as it is | after `sclkern.fuse` | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, times in found.items():
        values = *key, *(seconds_text(times[way]) for way in ("unfused", "fused"))
        lines.append(f"| {' | '.join(map(str, values))} | {times['unfused'] / times['fused']:.2f}x |")
    return "\n".join(lines)


def _training_table(rows: list[dict]) -> str:
    runs = [r for r in rows if r["case"].startswith("training/") and "pairs_per_second" in r]
    if not runs:
        return ""
    lines = [
        "| training run | steps | batch | precision | pairs a second | of the peak | waits for data | memory | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(runs, key=lambda row: row["case"]):
        share = f"{row['mfu']:.1%}" if "mfu" in row else ""
        memory = f"{row['peak_bytes'] / 1e9:.3g} GB" if "peak_bytes" in row else ""
        values = row["steps"], row["batch_size"], row["precision"], three_digits(row["pairs_per_second"]), share
        values += f"{row['data_wait_share']:.1%}", memory, f"{row['curve'][0][1]:.2f} to {row['curve'][-1][1]:.2f}"
        lines.append(f"| {row['case'].removeprefix('training/')} | {' | '.join(map(str, values))} |")
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


def embed(document: str, rows: list[dict]) -> str:
    """The document with the tables of the records between its two markers.

    Raises:
        UserError: it has not exactly one pair of markers, in their order, or names an unknown table.
    """
    found = list(BEGIN.finditer(document))
    if len(found) != 1 or document.count(END) != 1 or found[0].start() > document.index(END):
        raise UserError(
            f"expected <!-- sclkern bench report: begin --> once and {END} once after it, around what the records say"
        )
    tables = tuple(found[0][1].split()) or TABLES
    if unknown := set(tables) - set(TABLES):
        raise UserError(f"got the tables {sorted(unknown)}, expected some of {', '.join(TABLES)}")
    before, after = document[: found[0].end()], document.split(END)[1]
    return f"{before}\n{report(rows, tables)}\n{END}{after}"


def update(file: Path, rows: list[dict]) -> None:
    """Write the tables of the records between the markers of a document.

    Raises:
        UserError: the file does not exist or lacks the markers.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    try:
        file.write_text(embed(file.read_text(), rows))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
