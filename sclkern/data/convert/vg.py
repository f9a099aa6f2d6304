"""Visual Genome: pictures with the phrases of their regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from sclkern.data.convert.annotations import find, read_json, records
from sclkern.data.convert.karpathy import COCO_FILES, FLICKR_FILES, pictures_of_test_set
from sclkern.data.convert.plan import STRINGS, Listing, Options, Plan, Row, Table
from sclkern.data.files import DataFolder
from sclkern.errors import UserError

_FOLDERS = ("VG_100K", "VG_100K_2")
_INTEGERS = pa.list_(pa.int64())
_COLUMNS = pa.schema(
    [
        ("caption", STRINGS),
        ("width", _INTEGERS),
        ("height", _INTEGERS),
        ("x", _INTEGERS),
        ("y", _INTEGERS),
        ("image_id", pa.string()),
    ]
)
_BOX = ("width", "height", "x", "y")


def plan_vg(source: DataFolder, options: Options) -> Plan:
    """Visual Genome: VG_100K/, VG_100K_2/, region_descriptions.json and, to leave test sets out, image_data.json."""
    plan, listing = Plan(), Listing(source)
    name = "region_descriptions.json"
    find(source, (name,), "regions of Visual Genome")
    images = records(source, name, read_json(source, name, list, "a list of objects with regions"), ("regions",))
    left_out = _tests(source, options, plan)
    rows: list[Row] = []
    seen: set[int] = set()
    for number, image in enumerate(images):
        regions = records(source, name, image["regions"], ("image_id", "phrase"))
        plan.count("pictures")
        plan.count("phrases", len(regions))
        identifier = image.get("id", regions[0]["image_id"] if regions else None)
        if identifier is None:
            plan.dropped.add("pictures without a phrase", f"{name} record {number}")
            continue
        identifier = int(identifier)
        if identifier in seen:
            plan.dropped.add("records of a picture that an earlier one names", str(identifier))
            continue
        seen.add(identifier)
        file = f"{identifier}.jpg"
        folder = next((one for one in _FOLDERS if file in listing.names(one)), None)
        if identifier in left_out:
            plan.dropped.add(left_out[identifier], file)
        elif folder is None:
            plan.missing.add(_where(listing), file)
        else:
            kept = [one for one in regions if plan.captions([one["phrase"]], f"{folder}/{file}")]
            if kept:
                boxes = [[_integer(one.get(key)) for one in kept] for key in _BOX]
                phrases = [one["phrase"] for one in kept]
                rows.append(Row((f"{folder}/{file}",), (phrases, *boxes, str(identifier))))
            else:
                plan.dropped.add("pictures without a phrase", f"{folder}/{file}")
    if options.resize:
        plan.notes.append("boxes (width, height, x, y) are in pixels of the pictures before they were shrunk")
    plan.tables = [Table("vg", _COLUMNS, rows)]
    return plan


def _where(listing: Listing) -> str:
    absent = [folder for folder in _FOLDERS if not listing.names(folder)]
    return f"pictures; the folder {absent[0]}/ is missing or empty" if absent else "pictures of VG_100K/ and VG_100K_2/"


def _integer(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else -1


def _tests(source: DataFolder, options: Options, plan: Plan) -> dict[int, str]:
    """Pictures that a test set has, with the reason for which they are left out."""
    reasons: dict[int, str] = {}
    if not options.without_tests_of:
        return reasons
    name = "image_data.json"
    find(source, (name,), "list of pictures with coco_id and flickr_id")
    known = records(source, name, read_json(source, name, list, "a list of pictures"), ("image_id",))
    for chosen in options.without_tests_of:
        test_set, _, file = chosen.partition("=")
        if test_set not in ("coco", "flickr30k"):
            raise UserError(
                f"--without-tests-of: got {chosen!r}, expected coco and flickr30k, each with =FILE where "
                "Karpathy's file of it is not in SOURCE"
            )
        folder, there = source, file
        if file:
            folder, there = DataFolder(Path(file).parent), Path(file).name
            find(folder, (there,), "Karpathy's splits")
        else:
            candidates = COCO_FILES if test_set == "coco" else FLICKR_FILES
            there = find(source, candidates, f"splits of {test_set} (or give --without-tests-of {test_set}=FILE)") or ""
        coco, flickr = pictures_of_test_set(folder, there)
        reason = f"pictures of the test set of {test_set}"
        for image in known:
            # Without a counterpart, an id is null or -1.
            if image.get("coco_id") in coco or image.get("flickr_id") in flickr:
                reasons.setdefault(int(image["image_id"]), reason)
    in_coco = sum(isinstance(image.get("coco_id"), int) and image["coco_id"] >= 0 for image in known)
    plan.count("pictures that are also in COCO", in_coco)
    return reasons
