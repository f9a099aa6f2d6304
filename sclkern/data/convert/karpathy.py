"""COCO and Flickr30K in Karpathy's splits."""

from __future__ import annotations

from collections import Counter

from sclkern.data.convert.annotations import find, read_json, records
from sclkern.data.convert.plan import CAPTIONED, Listing, Options, Plan, Row, Table
from sclkern.data.files import DataFolder
from sclkern.data.names import is_plain
from sclkern.errors import UserError

# Where the splits lie; COCO's zip file has no folder.
COCO_FILES = ("karpathy/dataset_coco.json", "dataset_coco.json")
FLICKR_FILES = ("karpathy/dataset_flickr30k.json", "dataset_flickr30k.json")
_COCO_SIZES = {"train": 82783, "restval": 30504, "val": 5000, "test": 5000}
_FLICKR_SIZES = {"train": 29000, "val": 1014, "test": 1000}


def plan_coco(source: DataFolder, options: Options) -> Plan:
    """COCO: train2014/, val2014/ and karpathy/dataset_coco.json."""
    return _plan(source, COCO_FILES, "coco_caption_karpathy", _COCO_SIZES, None)


def plan_flickr30k(source: DataFolder, options: Options) -> Plan:
    """Flickr30K: flickr30k-images/ and dataset_flickr30k.json."""
    return _plan(source, FLICKR_FILES, "f30k_caption_karpathy", _FLICKR_SIZES, "flickr30k-images")


def _plan(source: DataFolder, files: tuple[str, ...], prefix: str, sizes: dict[str, int], pictures: str | None) -> Plan:
    plan, listing = Plan(), Listing(source)
    name = find(source, files, "Karpathy's splits")
    assert name is not None
    content = read_json(source, name, dict, "Karpathy's splits: images with sentences")
    images = records(source, name, content.get("images"), ("filename", "split", "sentences"))
    rows: dict[str, list[Row]] = {split: [] for split in sizes}
    seen: set[str] = set()
    folders: set[str] = set()
    counts: Counter[str] = Counter()
    for image in images:
        file, split = str(image["filename"]), image["split"]
        if split not in rows:
            raise UserError(
                f"{source.shown(name)}: {file} is of split {split!r}, expected one of {', '.join(sizes)}; is it the "
                "file of this set?"
            )
        folder = pictures or str(image.get("filepath", ""))
        path = f"{folder}/{file}"
        plan.count("pictures")
        counts[split] += 1
        if path in seen:
            plan.dropped.add("records of a picture that an earlier one names", path)
            continue
        seen.add(path)
        if is_plain(path):
            folders.add(folder)
        sentences = [one.get("raw") if isinstance(one, dict) else one for one in image["sentences"]]
        captions = plan.captions(sentences, path)
        plan.count("captions", len(captions))
        if len(captions) > 5:
            plan.count("pictures with more than five captions")
        if not listing.has(path):
            plan.missing.add(f"pictures of {folder}/", path)
        elif not captions:
            plan.dropped.add("pictures without a caption", path)
        else:
            rows[split].append(Row((path,), (captions, file, split)))
    named = {path.rpartition("/")[2] for path in seen}
    for folder in sorted(folders):
        if extra := sorted(listing.names(folder) - named):
            plan.count(f"files of {folder}/ that the splits do not name", len(extra))
    plan.notes += _compare(counts, sizes)
    plan.tables = [Table(f"{prefix}_{split}", CAPTIONED, rows[split]) for split in sizes]
    return plan


def _compare(counts: Counter[str], sizes: dict[str, int]) -> list[str]:
    """Notes on splits of another size than the published ones."""
    notes = [
        f"split {split} has {counts[split]:,} pictures, {size:,} as published"
        for split, size in sizes.items()
        if counts[split] != size
    ]
    first, second = "val", "test"
    if sizes[first] != sizes[second] and (counts[first], counts[second]) == (sizes[second], sizes[first]):
        notes.append(f"the sizes of {first} and {second} are those of each other: the splits seem to be swapped")
    return notes


def pictures_of_test_set(folder: DataFolder, name: str) -> tuple[set[int], set[int]]:
    """Pictures of a test set.

    Args:
        folder: where Karpathy's file lies.
        name: of the file.

    Returns:
        Ids in COCO, and ids at Flickr; a file has one kind.
    """
    content = read_json(folder, name, dict, "Karpathy's splits: images with sentences")
    images = records(folder, name, content.get("images"), ("filename", "split"))
    tests = [image for image in images if image["split"] == "test"]
    coco = {int(image["cocoid"]) for image in tests if "cocoid" in image}
    flickr = set() if coco else {int(stem) for i in tests if (stem := str(i["filename"]).split(".")[0]).isdigit()}
    return coco, flickr
