"""NLVR2: pairs of pictures with sentences that are true or false."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from sclkern.data.convert.annotations import find, read_text, records
from sclkern.data.convert.plan import STRINGS, Listing, Options, Plan, Row, Table
from sclkern.data.files import DataFolder
from sclkern.errors import UserError

_COLUMNS = pa.schema([("questions", STRINGS), ("answers", STRINGS), ("identifier", pa.string())])
_SPLITS = ("train", "dev", "test1")
_KINDS = ("balanced", "unbalanced")


def plan_nlvr2(source: DataFolder, options: Options) -> Plan:
    """NLVR2: nlvr2/data/*.json, images/train/<directory>/, dev/ and test1/; balanced and unbalanced where they are."""
    # About 5 % of the pictures cannot be had any more.
    plan, listing = Plan(known_for_losses=True), Listing(source)
    for split in _SPLITS:
        name = find(source, _places(f"{split}.json"), f"sentences of {split}")
        assert name is not None
        plan.tables.append(_table(source, f"nlvr2_{split}", split, name, listing, plan))
    for kind in _KINDS:
        for split in _SPLITS[1:]:
            there = find(source, _places(f"{kind}/{kind}_{split}.json"), "", optional=True)
            if there is None:
                plan.notes.append(f"{kind}_{split}: its list is not there")
            else:
                # Its pictures are those of the split, where losses are counted.
                part = _table(source, f"nlvr2_{kind}_{split}", split, there, listing, Plan())
                plan.tables.append(part)
    return plan


def _places(name: str) -> tuple[str, ...]:
    return (f"nlvr2/data/{name}", f"data/{name}", name)


def _table(source: DataFolder, table: str, split: str, name: str, listing: Listing, plan: Plan) -> Table:
    lines: list[Any] = []
    for number, line in enumerate(read_text(source, name).split("\n"), 1):
        if line.strip():
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise UserError(
                    f"{source.shown(name)}: line {number} is no JSON ({error}), expected an object a line; download "
                    "it again"
                ) from error
    pairs: dict[str, list[dict[str, Any]]] = {}
    for record in records(source, name, lines, ("sentence", "identifier", "label")):
        plan.count(f"sentences of {split}")
        pairs.setdefault(str(record["identifier"]).rpartition("-")[0], []).append(record)
    rows = []
    for identifier, of_pair in pairs.items():
        plan.count(f"pairs of {split}")
        folder = f"images/train/{of_pair[0].get('directory')}" if split == "train" else split
        files = tuple(f"{folder}/{identifier}-img{side}.png" for side in (0, 1))
        if lost := [file for file in files if not listing.has(file)]:
            plan.missing.add(f"pairs of {split} that lack a picture", lost[0])
            continue
        labels = [str(record["label"]) for record in of_pair]
        if strange := set(labels) - {"True", "False"}:
            raise UserError(
                f"{source.shown(name)}: {identifier} has the label {sorted(strange)[0]!r}, expected True or False; is "
                "it the right file?"
            )
        rows.append(Row(files, ([record["sentence"] for record in of_pair], labels, identifier)))
    return Table(table, _COLUMNS, rows, ("image_0", "image_1"))
