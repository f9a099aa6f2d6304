"""Published data sets as arrow files: ``sclkern data convert``.

Each set has a function that plans its tables from the annotation files (``SETS``); ``convert`` writes them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sclkern.data.convert.align_bench import plan_align_bench
from sclkern.data.convert.card import add_undecodable, build_card, card_path, read_card, write_card
from sclkern.data.convert.karpathy import plan_coco, plan_flickr30k
from sclkern.data.convert.nlvr2 import plan_nlvr2
from sclkern.data.convert.parts import Part, PartReport, PartWriter, join, read_report, table_schema, unchanged
from sclkern.data.convert.plan import Options, Plan, Table
from sclkern.data.convert.vg import plan_vg
from sclkern.data.convert.video import plan_lsmdc, plan_msrvtt, plan_webvid
from sclkern.data.convert.vqa import plan_vqav2
from sclkern.data.convert.web import plan_cc3m, plan_cc12m, plan_sbu
from sclkern.data.files import DataFolder
from sclkern.data.parallel import cores, map_in_processes
from sclkern.data.undecodable import undecodable_limit
from sclkern.errors import UserError
from sclkern.io import write_atomically

_log = logging.getLogger("sclkern.data")

SETS: dict[str, Callable[[DataFolder, Options], Plan]] = {
    "coco": plan_coco,
    "flickr30k": plan_flickr30k,
    "vg": plan_vg,
    "sbu": plan_sbu,
    "cc3m": plan_cc3m,
    "cc12m": plan_cc12m,
    "vqav2": plan_vqav2,
    "nlvr2": plan_nlvr2,
    "msrvtt": plan_msrvtt,
    "lsmdc": plan_lsmdc,
    "webvid": plan_webvid,
    "align-bench": plan_align_bench,
}
PART_ROWS = 1024


def convert(
    name: str,
    source: str | Path,
    output: str | Path,
    options: Options | None = None,
    *,
    workers: int | None = None,
    part_rows: int = PART_ROWS,
) -> dict[str, Any]:
    """Write a published data set as arrow files; a conversion that was stopped goes on where it was.

    Args:
        name: one of ``SETS``.
        source: folder of the set, local or an fsspec URL.
        output: folder of the arrow files and of the card.
        options: how to convert.
        workers: processes; None is one for each core.
        part_rows: rows that a process writes at a time, and at most loses when it is stopped.

    Returns:
        The card, as in ``<output>/<name>.card.json``.

    Raises:
        UserError: the set is unknown, a file is missing or is not what its name says, more pictures are missing or
            undecodable than 1 %, or the output holds files of another conversion.
    """
    options = options or Options()
    _check(name, options, workers)
    folder, output = DataFolder(source), Path(output)
    if not folder.is_dir():
        raise UserError(f"SOURCE: {folder.shown()} is no folder, expected that of the set {name}; correct it")
    plan = SETS[name](folder, options)
    tables = [table for table in plan.tables if table.rows]
    _check_missing(folder, plan, options)
    if not tables:
        raise UserError(f"{folder.shown()}: has no picture or clip of {name} with a text; docs/data.md has its tree")
    plan.tables = tables
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output, name):
        return _write(name, folder, output, options, plan, workers or cores(), part_rows)


def _check(name: str, options: Options, workers: int | None) -> None:
    if name not in SETS:
        raise UserError(f"SET: got {name!r}, expected one of {', '.join(SETS)}")
    clips = name in ("msrvtt", "lsmdc", "webvid")
    for argument, value, fits in (
        ("--resize", options.resize, (not clips or options.frames is not None) and name != "align-bench"),
        ("--frames", options.frames, clips),
        ("--without-tests-of", options.without_tests_of or None, name == "vg"),
    ):
        if value is not None and not fits:
            why = "its boxes and masks are in pixels" if name == "align-bench" else "it has no effect there"
            raise UserError(f"{argument}: got {value} for the set {name}, where {why}; leave it out")
    for argument, number in (("--resize", options.resize), ("--frames", options.frames), ("--workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{argument}: got {number}, expected at least 1")


def _check_missing(folder: DataFolder, plan: Plan, options: Options) -> None:
    total = plan.missing.total
    for reason, count in plan.missing.counts.items():
        first = plan.missing.names[reason][:1]
        _log.warning("%s missing: %s%s", f"{count:,}", reason, f", such as {first[0]}" if first else "")
    named = total + sum(len(table.rows) for table in plan.tables)
    if total > undecodable_limit(named) and not (options.allow_missing or plan.known_for_losses):
        reasons = "; ".join(
            f"{count:,} {reason} ({', '.join(plan.missing.names[reason][:3])})"
            for reason, count in plan.missing.counts.items()
        )
        raise UserError(
            f"{folder.shown()}: {total:,} of {named:,} files are missing: {reasons}; expected 1 % at most, or one; "
            "download them, or convert what is there with --allow-missing"
        )


def _write(
    name: str, folder: DataFolder, output: Path, options: Options, plan: Plan, workers: int, part_rows: int
) -> dict[str, Any]:
    before = read_card(output, name)
    _check_output(name, output, plan.tables, before)
    card = build_card(name, folder.shown(), options, plan)
    fingerprints = [f"{table.fingerprint(options)}:{part_rows}" for table in plan.tables]
    parts_folder = output / f".{name}.parts"
    writer = PartWriter(folder, plan.tables, fingerprints, options, parts_folder)
    done = {
        number: report
        for number, table in enumerate(plan.tables)
        if (report := read_report(output / f"{table.name}.arrow")) is not None
        and report.fingerprint == fingerprints[number]
        and unchanged(folder, report)
    }
    parts = [
        Part(number, part, start, min(start + part_rows, len(table.rows)))
        for number, table in enumerate(plan.tables)
        if number not in done
        for part, start in enumerate(range(0, len(table.rows), part_rows))
    ]
    total = sum(len(table.rows) for table in plan.tables)
    limit = total if plan.known_for_losses else undecodable_limit(total)
    bad: dict[str, str] = {}
    # The card names tables only once they are there, but their names are ours from now on.
    card["names"] = [table.name for table in plan.tables]
    write_card(output, card)
    for report in done.values():
        _count(bad, report, limit, total)
    reports = map_in_processes(
        writer,
        parts,
        workers=min(workers, max(1, len(parts))),
        description=f"{name} to arrow",
        unit="rows",
        total=sum(part.stop - part.start for part in parts),
        size=lambda part: part.stop - part.start,
    )
    for number, table in enumerate(plan.tables):
        path = output / f"{table.name}.arrow"
        if number in done:
            complete = done[number]
        else:
            complete = PartReport(fingerprints[number])
            own = [part for part in parts if part.table == number]
            for _ in own:
                report = next(reports)
                _count(bad, report, limit, total)
                complete.rows += report.rows
                complete.undecodable |= report.undecodable
            join(path, [writer.path(part) for part in own], table_schema(table, options), complete)
            shutil.rmtree(parts_folder / table.name)
        size, lost = path.stat().st_size, len(complete.undecodable)
        card["tables"][table.name] = {"rows": complete.rows, "bytes": size, "undecodable": lost}
        add_undecodable(card, bad)
        write_card(output, card)
    for file, value in plan.extra.items():
        content = (json.dumps(value, ensure_ascii=False, indent=0) + "\n").encode()
        write_atomically(output / file, partial(_write_bytes, content))
    shutil.rmtree(parts_folder, ignore_errors=True)
    card["complete"] = True
    write_card(output, card)
    return card


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _count(bad: dict[str, str], report: PartReport, limit: int, total: int) -> None:
    for file, (reason, _) in report.undecodable.items():
        if file not in bad and len(bad) < 20:
            _log.warning("undecodable: %s (%s)", file, reason)
        bad[file] = reason
    if len(bad) > limit:
        file, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad):,} of {total:,} files cannot be decoded, expected 1 % at most, or one; the first is {file} "
            f"({reason}); download them again and repeat the command, which keeps what is finished"
        )


def _check_output(name: str, output: Path, tables: list[Table], before: dict[str, Any]) -> None:
    ours = before.get("names", [])
    new = {table.name for table in tables}
    for table in tables:
        if table.name not in ours and (output / f"{table.name}.arrow").exists():
            raise UserError(
                f"--output: {output} has a {table.name}.arrow that no conversion of {name} has written there; remove "
                "it or choose another folder"
            )
    if stale := [old for old in ours if old not in new and (output / f"{old}.arrow").exists()]:
        raise UserError(
            f"--output: {output} has {stale[0]}.arrow of an earlier conversion of {name}, which this one would not "
            f"write; remove {card_path(output, name).name} and its tables, or choose another folder"
        )


@contextmanager
def _locked(output: Path, name: str) -> Iterator[None]:
    """Two conversions of one set into one folder would write the same parts. A lock ends with its process."""
    path = output / f".{name}.lock"
    with open(path, "w") as file:
        try:
            # Not flock, which processes that outlive this one would keep.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--output: another process converts {name} to {output} now; wait for it or choose another folder"
            ) from error
        yield
    path.unlink(missing_ok=True)
