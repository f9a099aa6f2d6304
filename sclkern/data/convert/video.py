"""MSRVTT, LSMDC and WebVid: clips with sentences. Clips stay files, which the column ``video`` names."""

from __future__ import annotations

import csv
import io
from typing import Any

from sclkern.data.convert.annotations import find, read_json, read_pickle, read_text, records
from sclkern.data.convert.plan import CAPTIONED, Listing, Options, Plan, Row, Table
from sclkern.data.files import DataFolder
from sclkern.errors import UserError

_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov")
_LISTS = ("high-quality/structured-symlinks/", "")
_LSMDC = {
    "train": ("LSMDC16_annos_training",),
    "val": ("LSMDC16_annos_val",),
    "test": ("LSMDC16_annos_test",),
    "public_test": ("LSMDC16_challenge_1000_publictect", "LSMDC16_annos_public"),
}


def plan_msrvtt(source: DataFolder, options: Options) -> Plan:
    """MSRVTT in the split 1k-A: videos/all/ with annotation/MSR_VTT.json and lists, or CLIP4Clip's CSV files."""
    plan, listing = Plan(known_for_losses=True), Listing(source)
    data = find(source, ("MSRVTT_data.json", "annotation/MSRVTT_data.json"), "", optional=True)
    train, test, captions = _clip4clip(source, data, plan) if data else _lists(source, plan)
    place = next((one for one in ("videos/all", "videos", "all") if listing.names(one)), "videos/all")
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for split, names in (("train", [(name, captions.get(name, [])) for name in train]), ("test", test)):
        for name, texts in names:
            plan.count(f"clips of {split}")
            if split == "train" and len(texts) != 20:
                plan.count("clips of train without exactly 20 captions")
            _add(plan, listing, rows[split], f"{place}/{name}", texts, name, split)
    plan.tables = [Table(f"msrvtt_{split}", CAPTIONED, rows[split], ("video",), clips=True) for split in rows]
    return plan


def _lists(source: DataFolder, plan: Plan) -> tuple[list[str], list[tuple[str, list[str]]], dict[str, list[str]]]:
    """Clips of training, clips of the test set with their caption, and all captions."""
    name = find(source, ("annotation/MSR_VTT.json", "MSR_VTT.json"), "annotations of MSRVTT")
    assert name is not None
    content = read_json(source, name, dict, "an object with annotations")
    captions: dict[str, list[str]] = {}
    for one in records(source, name, content.get("annotations"), ("image_id", "caption")):
        captions.setdefault(str(one["image_id"]), []).append(one["caption"])
    lists = {}
    for split, file in (("train", "train_list_jsfusion.txt"), ("test", "val_list_jsfusion.txt")):
        found = find(source, [folder + file for folder in _LISTS], f"list of 1k-A for {split}")
        lists[split] = read_text(source, found or "").split()
    found = find(source, [f"{folder}jsfusion_val_caption_idx.pkl" for folder in _LISTS], "captions of 1k-A")
    chosen = read_pickle(source, found or "", "the number of each clip's caption")
    test = []
    for clip in lists["test"]:
        index, texts = chosen.get(clip), captions.get(clip, [])
        if not isinstance(index, int) or not 0 <= index < len(texts):
            plan.dropped.add("clips of test without a caption", clip)
        else:
            test.append((clip, [texts[index]]))
    return lists["train"], test, captions


def _clip4clip(
    source: DataFolder, data: str, plan: Plan
) -> tuple[list[str], list[tuple[str, list[str]]], dict[str, list[str]]]:
    folder = data.removesuffix("MSRVTT_data.json")
    content = read_json(source, data, dict, "an object with sentences")
    captions: dict[str, list[str]] = {}
    for one in records(source, data, content.get("sentences"), ("video_id", "caption")):
        captions.setdefault(str(one["video_id"]), []).append(one["caption"])
    name = find(source, (f"{folder}MSRVTT_train.9k.csv",), "list of clips of training") or ""
    train = [one["video_id"] for one in _table(source, name, ("video_id",))]
    name = find(source, (f"{folder}MSRVTT_JSFUSION_test.csv",), "list of clips of the test set") or ""
    test = [(one["video_id"], [one["sentence"]]) for one in _table(source, name, ("video_id", "sentence"))]
    return train, test, captions


def _table(source: DataFolder, name: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(read_text(source, name), newline=""))
    if lacking := set(columns) - set(reader.fieldnames or ()):
        raise UserError(
            f"{source.shown(name)}: has no column {sorted(lacking)[0]}, expected {', '.join(columns)}; is it the file "
            "of this name?"
        )
    try:
        return records(source, name, list(reader), columns)
    except csv.Error as error:
        raise UserError(f"{source.shown(name)}: is no CSV ({error}); download it again") from error


def plan_lsmdc(source: DataFolder, options: Options) -> Plan:
    """LSMDC: six columns separated by tabs, clips in a folder for each film, or folders of frames."""
    plan, listing = Plan(), Listing(source)
    for split, stems in _LSMDC.items():
        names = [f"{place}{stem}{end}.csv" for end in ("", "_someone") for stem in stems for place in ("", "task1/")]
        name = find(source, names, f"sentences of {split}", optional=split in ("test", "public_test"))
        if name is None:
            plan.notes.append(f"{split}: its list is not there")
            continue
        if name.endswith("_someone.csv"):
            plan.notes.append(f"{split}: {name}, in which persons have no names")
        clips: dict[str, list[str]] = {}
        for number, line in enumerate(read_text(source, name).splitlines(), 1):
            columns = line.split("\t")
            if not line.strip():
                continue
            plan.count(f"sentences of {split}")
            if len(columns) != 6:
                plan.dropped.add("lines without six columns", f"{name} line {number}")
                continue
            if columns[0] in clips:
                plan.count(f"further sentences of a clip of {split}")
            clips.setdefault(columns[0], []).append(columns[5])
        rows: list[Row] = []
        for clip, texts in clips.items():
            plan.count(f"clips of {split}")
            place = f"{_film(clip)}/{clip}"
            folder = next((one for one in (place, clip) if source.is_dir(one)), None)
            _add(plan, listing, rows, folder or place, list(dict.fromkeys(texts)), clip, split, frames=bool(folder))
        plan.tables.append(Table(f"lsmdc_{split}", CAPTIONED, rows, ("video",), clips=True))
    return plan


def _film(clip: str) -> str:
    """A clip's name is that of its film and its times."""
    return clip.rpartition("_")[0] or clip


def plan_webvid(source: DataFolder, options: Options) -> Plan:
    """WebVid: results_*_{train,val}.csv with videos/<page_dir>/<videoid>.mp4, or lists (caption, path)."""
    plan, listing = Plan(known_for_losses=True), Listing(source)
    for split in ("train", "val"):
        rows: list[Row] = []
        names = [*source.glob(f"*_{split}.csv"), *source.glob(f"*{split}*.tsv")]
        for name in names:
            for clip, text, identifier in _entries(source, name, plan):
                plan.count(f"clips of {split}")
                _add(plan, listing, rows, clip, [text], identifier, split)
        if not names and split == "train":
            raise UserError(
                f"{source.shown()}: has neither results_2M_train.csv nor a .tsv of (caption, path), expected one of "
                "WebVid; correct SOURCE"
            )
        plan.tables.append(Table(f"webvid_{split}", CAPTIONED, rows, ("video",), clips=True))
    return plan


def _entries(source: DataFolder, name: str, plan: Plan) -> list[tuple[str, str, str]]:
    """Clip, caption and id."""
    if name.endswith(".csv"):
        rows: list[dict[str, Any]] = _table(source, name, ("videoid", "name", "page_dir"))
        return [(f"videos/{row['page_dir']}/{row['videoid']}", row["name"], row["videoid"]) for row in rows]
    entries = []
    for number, line in enumerate(read_text(source, name).splitlines(), 1):
        text, _, path = line.rpartition("\t")
        if not text.strip():
            plan.dropped.add("lines without caption and path", f"{name} line {number}")
            continue
        stem = path.rpartition("/")[2].rpartition(".")[0]
        entries.append((path, text, stem or path))
    return entries


def _add(
    plan: Plan,
    listing: Listing,
    rows: list[Row],
    clip: str,
    texts: list[str],
    identifier: str,
    split: str,
    *,
    frames: bool = False,
) -> None:
    """Add the row of a clip, if there is its file (with any ending) or its folder of frames, and a caption."""
    candidates = [clip, *(f"{clip}{ending}" for ending in _ENDINGS)]
    file = f"{clip}/" if frames else next((one for one in candidates if listing.has(one)), None)
    captions = plan.captions(texts, clip)
    if file is None:
        plan.missing.add(f"clips of {split}", clip)
    elif not captions:
        plan.dropped.add(f"clips of {split} without a caption", clip)
    else:
        rows.append(Row((file,), (captions, identifier, split)))
