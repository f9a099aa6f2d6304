"""Markdown tables of records, and the section of a document that must equal them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from sclkern.errors import UserError
from sclkern.tools.bench.ablations import CASES, ablation_table
from sclkern.tools.bench.contrasts import contrast_tables
from sclkern.tools.bench.demo_tasks import CASES as DEMO_TASKS
from sclkern.tools.bench.demo_tasks import demo_tasks_table
from sclkern.tools.bench.figures import OURS, memory_text, seconds_text, three_digits
from sclkern.tools.bench.results import page
from sclkern.tools.specs import PASSES, SPECS

# A record as JSON: "case", "device", and figures by name.
Record = dict[str, Any]

# The words between "begin" and "-->" choose the tables; without words, all tables of benchmarks.
BEGIN = re.compile(r"<!-- sclkern bench report: begin((?: [a-z]+)*) -->")
END = "<!-- sclkern bench report: end -->"
# Chooses the page of results, which is not told by machine.
RESULTS = "results"
# Op, size, dtype and pass of a record.
Key = tuple[str, str, str, str]
# The step's phases as plots show them: the fusion encoder's layers together, the losses together, the rest as "other".
GROUPS = ("image encoder", "text encoder", "fusion", "losses", "backward", "other")


def report(rows: list[Record], tables: tuple[str, ...] | None = None) -> str:
    """Tables of records, machine by machine.

    Args:
        rows: of ``sclkern.tools.bench.records.read``.
        tables: names in ``TABLES``; all without.

    Returns:
        Markdown, or "No records.".
    """
    tables = tables or TABLES
    machines: dict[str, list[Record]] = defaultdict(list)
    wanted = (*(_TABLES[table][0] for table in tables), *(["roofline"] if "ops" in tables else []))
    for row in rows:
        if row["case"].startswith(wanted):
            machines[row["device"]].append(row)
    parts = [text for device in sorted(machines) if (text := _machine(device, machines[device], tables))]
    return "\n\n".join(parts) if parts else "No records."


def _machine(device: str, rows: list[Record], tables: tuple[str, ...]) -> str:
    measured = [row for row in rows if row["case"] != "roofline"]
    commits = sorted({row["commit"] for row in measured or rows})
    versions = sorted({f"{name} {row[name]}" for row in rows for name in ("torch", "triton") if row.get(name)})
    details = [_described(rows), ", ".join(versions), f"commit {', '.join(commits)}"]
    parts = [f"**{device}** ({'; '.join(text for text in details if text)})"]
    roofline = next((row for row in rows if row["case"] == "roofline"), None)
    if roofline:
        rates = ", ".join(f"{t} {r / 1e12:.3g} TFLOP/s" for t, r in roofline["matrix_flops_per_second"].items())
        parts.append(f"Measured rates: copy {roofline['copy_bytes_per_second'] / 1e9:.3g} GB/s; matrix {rates}.")
    shown = [table for name in tables if (table := _TABLES[name][1](rows))]
    # Other records, such as the comparison of encodings, have no table.
    return "\n\n".join([*parts, *shown]) if shown or roofline else ""


def _described(rows: list[Record]) -> str:
    """The machine as its records name it: a GPU with its driver, or a processor with the threads that were used."""
    names = set()
    for row in rows:
        if row.get("device_name"):
            names.add(f"{row['device_name']}, driver {row.get('driver_version', 'unknown')}, CUDA {row.get('cuda')}")
        elif row.get("processor"):
            names.add(f"{row['processor']}, {row['threads']} threads")
    return " / ".join(sorted(names))


def op_rows(rows: list[Record]) -> dict[Key, dict[str, Record]]:
    """The records of ops by (op, size, dtype, pass), each by implementation, in the order of ``SPECS``."""
    sizes = list(
        dict.fromkeys((op, size.name) for op, spec in SPECS.items() for size in (*spec.sizes, *spec.cpu_sizes))
    )
    by_key: dict[Key, dict[str, Record]] = defaultdict(dict)
    for row in rows:
        if row["case"].startswith("op/"):
            by_key[row["op"], row["size"], row["dtype"], row["pass"]][row["way"]] = row

    def position(key: Key) -> tuple[int, int, str, int]:
        op, size, dtype, pass_ = key
        listed = sizes.index((op, size)) if (op, size) in sizes else len(sizes)
        # GPU and CPU may share a size: an op's sizes stay together, and numbers in their order.
        first = next((i for i, (other, _) in enumerate(sizes) if other == op), len(sizes))
        return first, int(size) if size.isdigit() else listed, dtype, PASSES.index(pass_)

    return {key: by_key[key] for key in sorted(by_key, key=position)}


def op_table(rows: list[Record]) -> str:
    """Time of sclkern, its share of the roofline, and the baselines with their multiple of it; "" without records."""
    lines = []
    for (op, size, dtype, pass_), records in op_rows(rows).items():
        ours = records.get(OURS)
        others = ", ".join(_baseline(row, ours) for name, row in records.items() if name != OURS)
        time = seconds_text(ours["seconds"]) if ours else ""
        share = f"{ours['roofline_fraction']:.0%}" if ours and bounded_by_roofline(op) else ""
        lines.append(f"| {op} | {size} | {dtype} | {pass_} | {time} | {share} | {others} |")
    if not lines:
        return ""
    head = (
        "| op | size | dtype | pass | sclkern | of the roofline | others (times ours) |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _baseline(row: Record, ours: Record | None) -> str:
    notes = [f"{row['seconds'] / ours['seconds']:.2f}x"] if ours else []
    if ours and row["dropout_p"] != ours["dropout_p"]:
        notes.append("no dropout")
    if row.get("without"):
        notes.append(f"no {', '.join(row['without'])}")
    return f"{row['way']} {seconds_text(row['seconds'])}" + (f" ({', '.join(notes)})" if notes else "")


def step_rows(rows: list[Record]) -> list[Record]:
    """The records of whole steps, by batch and name."""
    return sorted((r for r in rows if r["case"].startswith("step/")), key=lambda row: (row["rows"], row["case"]))


def grouped_phases(row: Record) -> dict[str, float]:
    """Seconds of a step's record by ``GROUPS``: the median times the shares of one profiled step."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for name, share in row.get("phases", {}).items():
        group = "losses" if name.startswith("loss ") else "fusion" if name.startswith("fusion") else name
        seconds[group if group in seconds else "other"] += share * row["median_seconds"]
    return seconds


def _step_table(rows: list[Record]) -> str:
    steps = step_rows(rows)
    if not steps:
        return ""
    lines = [
        "| training step | pairs | dtype | median | pairs a second | activations |",
        "|---|---|---|---|---|---|",
    ]
    for row in steps:
        name = row["case"].removeprefix("step/")
        memory = f"{row['activation_bytes'] / 1e9:.3g} GB" if "activation_bytes" in row else ""
        values = seconds_text(row["median_seconds"]), f"{row['pairs_per_second']:.3g}", memory
        lines.append(f"| {name} | {row['rows']} | {row['dtype']} | {' | '.join(values)} |")
    return "\n".join(lines)


def ratio_rows(rows: list[Record]) -> list[Record]:
    """The records of the planned step beside separate passes in turns."""
    return sorted((row for row in rows if row["case"].startswith("step_ratio/")), key=lambda row: row["case"])


def _ratio_table(rows: list[Record]) -> str:
    ratios = ratio_rows(rows)
    if not ratios:
        return ""
    lines = [
        "| planned step and separate passes in turns | pairs | faster | as FLOPs allow | quotient |",
        "|---|---|---|---|---|",
    ]
    for row in ratios:
        values = (f"{row[name]:.2f}x" for name in ("ratio", "flops_ratio"))
        name = row["case"].removeprefix("step_ratio/")
        lines.append(f"| {name} | {row['rows']} | {' | '.join(values)} | {row['quotient']:.2f} |")
    return "\n".join(lines)


def decoding_rows(rows: list[Record]) -> list[Record]:
    """The records of pictures a second of a core, by our loader and others."""
    return sorted((row for row in rows if row["case"].startswith("decoding/")), key=lambda row: row["case"])


def _decoding_table(rows: list[Record]) -> str:
    decoding = decoding_rows(rows)
    if not decoding:
        return ""
    lines = [
        "| pictures a second of a core | size | sclkern | published way | faster | fastest other | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in decoding:
        rates, other = row["pictures_per_second"], row["fastest_other"]
        values = [f"{row['width']} x {row['height']} to {row['pixels']}", three_digits(rates["sclkern"])]
        values += [three_digits(rates["published"]), f"{row['faster_than_published']:.2f}x"]
        values += [f"{other} {three_digits(rates[other])}", f"{row['faster_than_other']:.2f}x"]
        lines.append(f"| {row['case'].removeprefix('decoding/')} | {' | '.join(values)} |")
    return "\n".join(lines)


def _clips_table(rows: list[Record]) -> str:
    clips = sorted((row for row in rows if row["case"].startswith("clips/")), key=lambda row: row["case"])
    if not clips:
        return ""
    lines = ["| clips a second of a core | frames | sclkern | fastest other | faster |", "|---|---|---|---|---|"]
    for row in clips:
        rates, other = row["clips_per_second"], row["fastest_other"]
        values = [f"{row['rows']} of {row['frames']}", three_digits(rates["sclkern"])]
        values += [f"{other} {three_digits(rates[other])}", f"{row['faster_than_other']:.2f}x"]
        lines.append(f"| {row['case'].removeprefix('clips/')} | {' | '.join(values)} |")
    return "\n".join(lines)


def _retrieval_table(rows: list[Record]) -> str:
    retrievals = sorted((row for row in rows if row["case"].startswith("retrieval/")), key=lambda row: row["case"])
    if not retrievals:
        return ""
    lines = [
        "| pairs that the fusion encoder scores a second | dtype | sclkern | published loop | faster |",
        "|---|---|---|---|---|",
    ]
    for row in retrievals:
        rates = [three_digits(median(row[name])) for name in ("pairs_a_second", "published_pairs_a_second")]
        name = f"{row['case'].removeprefix('retrieval/')} channels, {row['images']} images, {row['texts']} captions"
        lines.append(f"| {name} | {row['dtype']} | {' | '.join(rates)} | {row['ratio']:.2f}x |")
    return "\n".join(lines)


def _models_table(rows: list[Record]) -> str:
    models: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
    for row in rows:
        if row["case"].startswith("model/"):
            key = row["model"], row["layers"], row["rows"], row["dtype"]
            models[key][row["way"]] = row
    complete = {key: ways for key, ways in sorted(models.items()) if len(ways) == 2}
    if not complete:
        return ""
    lines = [
        "| model | layers | rows | dtype | as it is | after `sclkern.fuse` | faster | memory before and after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, ways in complete.items():
        before, after = ways["unfused"], ways["fused"]
        values = *key, *(seconds_text(row["median_seconds"]) for row in (before, after))
        peaks = [memory_text(row["peak_bytes"]) for row in (before, after) if "peak_bytes" in row]
        ratio = f"{before['median_seconds'] / after['median_seconds']:.2f}x"
        lines.append(f"| {' | '.join(map(str, values))} | {ratio} | {', '.join(peaks)} |")
    return "\n".join(lines)


def _training_table(rows: list[Record]) -> str:
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
        values = [row["steps"], row["batch_size"], row["precision"], three_digits(row["pairs_per_second"]), share]
        values += [f"{row['data_wait_share']:.1%}", memory]
        values += [f"{row['curve'][0][1]:.2f} to {row['curve'][-1][1]:.2f}"]
        lines.append(f"| {row['case'].removeprefix('training/')} | {' | '.join(map(str, values))} |")
    return "\n".join(lines)


def bounded_by_roofline(op: str) -> bool:
    """Whether bytes and FLOPs bound the op: a draw of a few kilobytes is bound by its launch."""
    return op not in SPECS or SPECS[op].differentiable


def memory_rows(rows: list[Record]) -> list[Record]:
    """The records of the contrastive loss with a peak of memory, forward with backward."""
    losses = [r for r in rows if r.get("op") == "completion_loss" and r.get("peak_bytes") and r["pass"] == "both"]
    return sorted(losses, key=lambda row: (row["dtype"], row["way"], row["values"]["N"], row["size"]))


def memory_table(rows: list[Record]) -> str:
    """Peak memory of the contrastive loss beside its inputs; "" without records."""
    losses = memory_rows(rows)
    if not losses:
        return ""
    lines = [
        "| contrastive loss, forward and backward | N | dtype | peak memory beside its inputs |",
        "|---|---|---|---|",
    ]
    for row in losses:
        rows_of = " of ".join(str(row["values"][name]) for name in ("N", "M") if name in row["values"])
        lines.append(f"| {row['way']} | {rows_of} | {row['dtype']} | {row['peak_bytes'] / 1e6:.4g} MB |")
    return "\n".join(lines)


# The prefix of the cases that a table shows, and what makes it.
_TABLES: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    "step": ("step/", _step_table),
    "ratio": ("step_ratio/", _ratio_table),
    "decoding": ("decoding/", _decoding_table),
    "clips": ("clips/", _clips_table),
    "retrieval": ("retrieval/", _retrieval_table),
    "models": ("model/", _models_table),
    "training": ("training/", _training_table),
    "ablations": (CASES, ablation_table),
    "demotasks": (DEMO_TASKS, demo_tasks_table),
    "ops": ("op/", op_table),
    "memory": ("op/", memory_table),
    "contrast": ("contrast", contrast_tables),
}
TABLES = tuple(_TABLES)


def embed(document: str, rows: list[Record]) -> str:
    """Put the tables of records between the two markers of a document.

    Args:
        document: Markdown with one pair of markers.
        rows: of ``sclkern.tools.bench.records.read``.

    Returns:
        The document with the tables.

    Raises:
        UserError: the document has not exactly one pair of markers in their order, or names an unknown table.
    """
    begins = list(BEGIN.finditer(document))
    if len(begins) != 1 or document.count(END) != 1 or begins[0].start() > document.index(END):
        raise UserError(
            f"expected <!-- sclkern bench report: begin --> once and {END} once after it, around what the records say"
        )
    tables = tuple(begins[0][1].split()) or TABLES
    if (unknown := set(tables) - set(TABLES)) and tables != (RESULTS,):
        raise UserError(f"got the tables {sorted(unknown)}, expected some of {', '.join(TABLES)}, or {RESULTS} alone")
    shown = page(rows) if tables == (RESULTS,) else report(rows, tables)
    before, after = document[: begins[0].end()], document.split(END)[1]
    return f"{before}\n{shown}\n{END}{after}"


def update(file: Path, rows: list[Record]) -> None:
    """Write the tables of records between the markers of a file.

    Args:
        file: a Markdown document with one pair of markers.
        rows: of ``sclkern.tools.bench.records.read``.

    Raises:
        UserError: the file does not exist or lacks the markers.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    try:
        file.write_text(embed(file.read_text(), rows))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
