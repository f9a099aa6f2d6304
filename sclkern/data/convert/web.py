"""SBU, CC3M and CC12M: pictures of web pages, as ViLT's tree or as the tars of img2dataset."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from sclkern.data.convert.annotations import read_json
from sclkern.data.convert.plan import Listing, Member, Options, Plan, Row, split_rows
from sclkern.data.files import DataFolder
from sclkern.data.sources.tar import check_end, check_start
from sclkern.data.text import one_line
from sclkern.errors import UserError

# As published; CC12M has no published form and takes the same.
TABLE_ROWS = 100_000
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def plan_sbu(source: DataFolder, options: Options) -> Plan:
    """SBU: tables sbu_0 and so on."""
    return _plan(source, {"train": "sbu"})


def plan_cc3m(source: DataFolder, options: Options) -> Plan:
    """CC3M: tables conceptual_caption_train_0 and so on, and conceptual_caption_val_0."""
    return _plan(source, {"train": "conceptual_caption_train", "val": "conceptual_caption_val"})


def plan_cc12m(source: DataFolder, options: Options) -> Plan:
    """CC12M: tables cc12m_0 and so on."""
    return _plan(source, {"train": "cc12m"})


def _plan(source: DataFolder, prefixes: dict[str, str]) -> Plan:
    plan = Plan(known_for_losses=True)
    tars = {split: source.glob("*.tar" if split == "train" else f"{split}/*.tar") for split in prefixes}
    tars["train"] += source.glob("train/*.tar")
    trees = {
        split: name
        for split in prefixes
        if (name := _annotations(source, split)) is not None
    }  # fmt: skip
    if any(tars.values()) and trees:
        raise UserError(
            f"{source.shown()}: has tars and {next(iter(trees.values()))}, expected img2dataset's tars or ViLT's tree; "
            "name the folder of one of them"
        )
    if not any(tars.values()) and not trees:
        raise UserError(
            f"{source.shown()}: has neither tars nor annot.json, expected img2dataset's 00000.tar and so on, or ViLT's "
            "tree with annot.json and images_train/; correct SOURCE"
        )
    for split, prefix in prefixes.items():
        rows = _of_tars(source, tars[split], split, plan)
        if split in trees:
            rows += _of_tree(source, trees[split], split, plan)
        plan.tables += split_rows(prefix, rows, TABLE_ROWS)
    return plan


def _annotations(source: DataFolder, split: str) -> str | None:
    names = (f"{split}_annot.json", "annot.json") if split == "train" else (f"{split}_annot.json",)
    return next((name for name in names if source.info(name) is not None), None)


def _of_tree(source: DataFolder, name: str, split: str, plan: Plan) -> list[Row]:
    """ViLT's tree: pictures are found by their own name, whatever folder the list names."""
    listed = read_json(source, name, list, "a list of [path, caption]")
    top = f"images_{split}"
    listing = Listing(source)
    folders = [top, *(f"{top}/{folder}" for folder in sorted(source.names_in(top, folders=True)))]
    places: dict[str, list[str]] = {}
    for folder in folders:
        for file in sorted(listing.names(folder)):
            places.setdefault(file, []).append(f"{folder}/{file}")
    rows = []
    used: set[str] = set()
    for number, entry in enumerate(listed):
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(
                f"{source.shown(name)}: record {number} is {one_line(repr(entry), 60)}, expected [path, caption]; is "
                "it ViLT's list?"
            )
        path, caption = entry
        plan.count(f"pictures that {name} names")
        file = path.rpartition("/")[2]
        found = places.get(file, [])
        if len(found) > 1:
            found = [place for place in found if place.split("/")[-2:] == path.split("/")[-2:]]
        if not found:
            plan.missing.add(f"pictures of {top}/", path)
        elif len(found) > 1:
            plan.dropped.add("names that stand for several pictures", path)
        elif found[0] in used:
            plan.dropped.add("records of a picture that an earlier one names", path)
        elif captions := plan.captions([caption], path):
            used.add(found[0])
            rows.append(Row((found[0],), (captions, file, split)))
    total = sum(map(len, places.values()))
    if total > len(used):
        plan.count(f"files of {top}/ that no caption goes with", total - len(used))
    return rows


def _of_tars(source: DataFolder, tars: list[str], split: str, plan: Plan) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    for tar in tars:
        for key, sample in _samples(source, tar):
            plan.count("samples of tars")
            picture, record = sample.get("picture"), sample.get("json", {})
            status = record.get("status", "success")
            name = f"{tar}:{key}"
            if status != "success" or picture is None:
                plan.missing.add("samples without a picture" if status == "success" else f"status {status}", name)
                continue
            if key in seen:
                plan.dropped.add("samples with the key of an earlier one", name)
                continue
            seen.add(key)
            captions = plan.captions([sample.get("txt", record.get("caption"))], name)
            if captions:
                rows.append(Row((picture,), (captions, key, split)))
        _count_failures(source, tar, plan)
    return rows


def _samples(source: DataFolder, tar: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The members of each key, which stand side by side."""
    key, sample = "", dict[str, Any]()
    with source.open(tar) as file:
        check_start(source.shown(tar), file.read(512))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as opened:
                for member in opened:
                    if not member.isfile():
                        continue
                    folder, _, last = member.name.rpartition("/")
                    stem, _, suffix = last.partition(".")
                    this = f"{folder}/{stem}" if folder else stem
                    if sample and (this != key or suffix in sample):
                        yield key, sample
                        sample = {}
                    key = this
                    if f".{suffix.lower()}" in _PICTURES:
                        sample["picture"] = Member(tar, member.name, member.offset_data, member.size)
                        sample[suffix] = None
                    elif suffix in ("txt", "json"):
                        if member.size > 1 << 24:
                            raise UserError(f"{source.shown(tar)}: {one_line(member.name)} has {member.size} bytes")
                        extracted = opened.extractfile(member)
                        assert extracted is not None
                        sample[suffix] = _text(extracted.read(), suffix)
                end = opened.offset
        except tarfile.TarError as error:
            raise UserError(
                f"{source.shown(tar)}: is no whole tar ({error}), expected an uncompressed one of img2dataset; "
                "download it again"
            ) from error
        check_end(source.shown(tar), file, end)
    if sample:
        yield key, sample


def _text(content: bytes, suffix: str) -> Any:
    text = content.decode("utf-8", "replace")
    if suffix == "txt":
        return text
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {"status": "with broken JSON"}


def _count_failures(source: DataFolder, tar: str, plan: Plan) -> None:
    """img2dataset lists pictures that it could not download in a parquet file beside the tar."""
    name = f"{tar.removesuffix('.tar')}.parquet"
    if source.info(name) is None:
        return
    try:
        with source.open(name) as file:
            statuses = pq.read_table(file, columns=["status"])["status"].value_counts().to_pylist()
    except Exception as error:  # pyarrow raises errors of every kind on broken files
        plan.notes.append(f"{name}: cannot be read ({one_line(str(error), 100)}); its failed rows are not counted")
        return
    for entry in statuses:
        if entry["values"] not in (None, "success"):
            plan.missing.add(f"status {entry['values']}", count=entry["counts"])
