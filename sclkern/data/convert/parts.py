"""Writing tables in parts, by several processes, so that a conversion that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from sclkern.data.convert.pictures import read_clip, read_picture, reason_of, size_of
from sclkern.data.convert.plan import Options, Row, Table
from sclkern.data.files import DataFolder
from sclkern.errors import UserError
from sclkern.io import write_atomically

_KEY = b"sclkern"
# Rows of a record batch, which a reader maps at once.
BATCH_ROWS = 256


@dataclass
class PartReport:
    """What a part or a table has.

    Attributes:
        fingerprint: of the plan that it follows.
        rows: how many it has.
        undecodable: reason and bytes of each file that could not be used, by name.
    """

    fingerprint: str
    rows: int = 0
    undecodable: dict[str, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Some rows of a table.

    Attributes:
        table: number of the table.
        number: of the part.
        start: its first row.
        stop: the row behind its last one.
    """

    table: int
    number: int
    start: int
    stop: int


class PartWriter:
    """Writes the parts of tables; processes call it.

    Args:
        source: the set.
        tables: all tables.
        fingerprints: of the tables.
        options: of the conversion.
        folder: of the parts.
    """

    def __init__(
        self, source: DataFolder, tables: Sequence[Table], fingerprints: Sequence[str], options: Options, folder: Path
    ) -> None:
        self._source = source
        self._tables = tables
        self._fingerprints = fingerprints
        self._options = options
        self._folder = folder

    def path(self, part: Part) -> Path:
        """Where a part lies."""
        return self._folder / self._tables[part.table].name / f"{part.number:06}.arrow"

    def __call__(self, part: Part) -> PartReport:
        """Write a part, unless it is there.

        Args:
            part: which rows.

        Returns:
            What it has.
        """
        table = self._tables[part.table]
        fingerprint = f"{self._fingerprints[part.table]}:{part.start}:{part.stop}"
        path = self.path(part)
        there = read_report(path)
        if there is not None and there.fingerprint == fingerprint and unchanged(self._source, there):
            return there
        report = PartReport(fingerprint)
        rows = [self._read(table, row, report) for row in table.rows[part.start : part.stop]]
        kept = [row for row in rows if row is not None]
        report.rows = len(kept)
        schema = table_schema(table, self._options)
        batches = [_batch(table, kept[start : start + BATCH_ROWS], schema) for start in range(0, len(kept), BATCH_ROWS)]
        write_atomically(path, lambda temporary: _write(temporary, with_report(schema, report), batches))
        return report

    def _read(self, table: Table, row: Row, report: PartReport) -> list[Any] | None:
        """The values of a row; None where a file cannot be used."""
        values: list[Any] = []
        for file in row.files:
            try:
                if table.clips:
                    assert isinstance(file, str)
                    values.append(read_clip(self._source, file, self._options.frames, self._options.resize))
                else:
                    values.append(read_picture(self._source, file, self._options.resize))
            except UserError:  # the source itself cannot be read
                raise
            except ValueError as error:
                report.undecodable[str(file)] = (reason_of(error), size_of(self._source, file))
        return [*values, *row.values] if len(values) == len(row.files) else None


def table_schema(table: Table, options: Options) -> pa.Schema:
    """The columns of a table, files first."""
    kind = pa.binary()
    names = table.pictures
    if table.clips:
        kind = pa.list_(pa.binary()) if options.frames else pa.string()
        names = ("frames",) if options.frames else names
    return pa.schema([*((name, kind) for name in names), *table.columns])


def _batch(table: Table, rows: list[list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    try:
        arrays = [pa.array([row[i] for row in rows], column.type) for i, column in enumerate(schema)]
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError) as error:
        raise UserError(
            f"{table.name}: a row has a value of another type than expected ({error}); correct the annotations"
        ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _write(path: Path, schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def with_report(schema: pa.Schema, report: PartReport) -> pa.Schema:
    """A schema whose metadata holds a report."""
    content = {
        "fingerprint": report.fingerprint,
        "rows": report.rows,
        "undecodable": dict(sorted(report.undecodable.items())),
    }
    return schema.with_metadata({_KEY: json.dumps(content).encode("utf-8", "surrogatepass")})


def read_report(path: Path) -> PartReport | None:
    """The report of a file that a conversion has written; None where there is no such file."""
    try:
        with pa.memory_map(str(path)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
        content = json.loads(metadata[_KEY])
        bad = {name: (str(reason), int(size)) for name, (reason, size) in content["undecodable"].items()}
        return PartReport(str(content["fingerprint"]), int(content["rows"]), bad)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def unchanged(source: DataFolder, report: PartReport) -> bool:
    """Whether the files that could not be used are as they were; a part is written again for repaired ones."""
    return all(
        size < 0 or ":" in name or size_of(source, name) == size for name, (_, size) in report.undecodable.items()
    )


def join(path: Path, parts: Sequence[Path], schema: pa.Schema, report: PartReport) -> None:
    """Write the batches of parts to one file.

    Args:
        path: the file, which appears whole or not at all.
        parts: files in order.
        schema: of the table.
        report: goes into its metadata.
    """
    complete = with_report(schema, report)

    def write(temporary: Path) -> None:
        with pa.ipc.new_file(temporary, complete) as writer:
            for part in parts:
                with pa.memory_map(str(part)) as file:
                    reader = pa.ipc.open_file(file)
                    for number in range(reader.num_record_batches):
                        batch = reader.get_batch(number)
                        writer.write_batch(batch.replace_schema_metadata(complete.metadata))

    write_atomically(path, write)
