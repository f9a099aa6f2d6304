"""Files that name pictures and their captions, in the forms in which sets are published.

| file | form |
|---|---|
| .json | a list of objects, such as ``{"image": "a.jpg", "caption": "a cat"}``; or of lists ``["a.jpg", "a cat"]`` |
| .json | COCO's captions: ``images`` and ``annotations`` |
| .json | Karpathy's splits: ``images`` with ``sentences`` (dataset_coco.json, dataset_flickr30k.json) |
| .jsonl | such an object a line |
| .csv, .tsv | a header, then a picture a line; .csv may be separated by commas, tabs or semicolons |

The picture is under one of the names ``IMAGE_NAMES``, captions, one or a list, under one of ``CAPTION_NAMES``;
"split" and "image_id" are optional. A file that has several of these names is refused.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sclkern.data.files import DataFolder
from sclkern.data.text import one_line
from sclkern.errors import UserError

IMAGE_NAMES = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "file_name",
    "filename",
    "file",
    "img",
    "video",
    "video_path",
)
CAPTION_NAMES = ("caption", "captions", "text", "title", "sentence", "sentences")
_ID_NAMES = ("image_id", "cocoid", "imgid")
_FORMS = (
    'a list of objects such as {"image": "a.jpg", "caption": "a cat"}, COCO\'s captions (images, annotations) or '
    "Karpathy's splits (images with sentences)"
)


@dataclass(frozen=True)
class Record:
    """A picture with captions, as a file names it; nothing is checked yet.

    Attributes:
        place: where it stands in the file, for messages: ``"line 7"``.
        image: path of the picture.
        captions: its captions.
        split: its split.
        image_id: its id.
        problem: why it cannot be read.
    """

    place: str
    image: object
    captions: list[object]
    split: str | None = None
    image_id: str | None = None
    problem: str | None = None


def read_records(folder: DataFolder, name: str) -> Iterator[Record]:
    """Read a file.

    Args:
        folder: of the data.
        name: of the file, which tells its form by its suffix.

    Yields:
        Its records in order.

    Raises:
        UserError: the file is missing, empty, not in UTF-8, or not of its form.
    """
    text = _text(folder, name)
    if name.endswith(".json"):
        yield from _of_json(folder, name, text)
    elif name.endswith(".jsonl"):
        yield from _of_lines(folder, name, text)
    else:
        yield from _of_table(folder, name, text)


def _text(folder: DataFolder, name: str) -> str:
    shown, content = folder.shown(name), folder.read(name)
    if not content.strip():
        raise UserError(f"{shown}: is empty, expected {name.rpartition('.')[2].upper()}; write or download it again")
    if content.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ")):
        raise UserError(f"{shown}: is packed, expected plain text as its name says; unpack it")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{shown}: is in UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in content[:4096]:
            raise UserError(
                f"{shown}: is no text, it begins with {content[:12]!r}, expected {name.rpartition('.')[2].upper()}; "
                "write or download it again, or correct its name"
            ) from error
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shown}: is not in UTF-8 (line {line}, byte {error.start}), expected UTF-8; convert it, such as by "
            "iconv -f ISO-8859-1 -t UTF-8"
        ) from error
    if text.lstrip()[:15].lower().startswith(("<!doctype html", "<html")):
        raise UserError(f"{shown}: is an HTML page, as of a failed download; download it again")
    return text


def _of_json(folder: DataFolder, name: str, text: str) -> Iterator[Record]:
    content = _parse(folder, name, text)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            return _of_coco(folder, name, content)
        if any(isinstance(image, dict) and "sentences" in image for image in content["images"][:10]):
            return _of_karpathy(folder, name, content["images"])
    if not isinstance(content, list):
        found = f"an object with {_listed(content)}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{folder.shown(name)}: holds {found}, expected {_FORMS}; convert it")
    return _of_objects(folder, name, ((f"record {number}", one) for number, one in enumerate(content)))


def _parse(folder: DataFolder, name: str, text: str, place: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and not place:
            raise UserError(
                f"{folder.shown(name)}: goes on after its first value (line {error.lineno}), as JSON lines do; name "
                "it .jsonl"
            ) from error
        where = place or f"line {error.lineno}"
        raise UserError(
            f"{folder.shown(name)}: {where} is no JSON ({error.msg}), expected a whole file; write or download it again"
        ) from error
    except RecursionError as error:
        raise UserError(f"{folder.shown(name)}: is nested too deeply, expected {_FORMS}; write it again") from error


def _of_lines(folder: DataFolder, name: str, text: str) -> Iterator[Record]:
    lines = (
        (f"line {number}", _parse(folder, name, line, f"line {number}"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )
    return _of_objects(folder, name, lines)


def _of_objects(folder: DataFolder, name: str, objects: Iterator[tuple[str, Any]]) -> Iterator[Record]:
    """Records of objects, whose first tells the names; or of lists [path, caption]."""
    columns: tuple[str, str] | None = None
    for place, one in objects:
        if isinstance(one, list) and len(one) == 2:
            yield Record(place, one[0], one[1] if isinstance(one[1], list) else [one[1]])
            continue
        if not isinstance(one, dict):
            raise UserError(f"{folder.shown(name)}: {place} is {type(one).__name__}, expected an object; convert it")
        columns = columns or _columns(folder, name, one, place)
        image, captions = (one.get(column) for column in columns)
        captions = [_raw(caption) for caption in captions] if isinstance(captions, list) else [captions]
        yield Record(place, image, captions, _optional(one.get("split")), _id(one))


def _raw(sentence: Any) -> Any:
    """Karpathy's sentences are objects with the text under "raw"."""
    return sentence.get("raw") if isinstance(sentence, dict) else sentence


def _of_coco(folder: DataFolder, name: str, content: dict[str, Any]) -> Iterator[Record]:
    images = {}
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
            raise UserError(
                f"{folder.shown(name)}: image {number} has {_listed(image)}, expected id and file_name as in COCO's "
                "captions; convert it"
            )
        if image["id"] in images:
            raise UserError(
                f"{folder.shown(name)}: has two images of id {one_line(str(image['id']), 60)}, expected one; write or "
                "download it again"
            )
        images[image["id"]] = image["file_name"]
    for number, one in enumerate(content["annotations"]):
        place = f"annotation {number}"
        if not isinstance(one, dict) or "image_id" not in one or "caption" not in one:
            raise UserError(
                f"{folder.shown(name)}: annotation {number} has {_listed(one)}, expected image_id and caption; is it "
                "COCO's captions_*.json?"
            )
        yield Record(place, images.get(one["image_id"]), [one["caption"]], None, str(one["image_id"]))


def _of_karpathy(folder: DataFolder, name: str, images: list[Any]) -> Iterator[Record]:
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list) or "filename" not in image:
            raise UserError(
                f"{folder.shown(name)}: image {number} has {_listed(image)}, expected filename, sentences and split as "
                "in Karpathy's files; download it again"
            )
        path = image["filename"]
        if isinstance(path, str) and image.get("filepath"):
            path = f"{image['filepath']}/{path}"
        captions = [_raw(sentence) for sentence in image["sentences"]]
        yield Record(f"image {number}", path, captions, _optional(image.get("split")), _id(image))


def _of_table(folder: DataFolder, name: str, text: str) -> Iterator[Record]:
    first = text[: text.find("\n")] if "\n" in text else text
    separator = "\t" if name.endswith(".tsv") else next((s for s in ",\t;" if s in first), ",")
    # A field of any length, but not one that grows without bound from a quote that is never closed.
    csv.field_size_limit(1 << 20)
    # newline="" keeps what stands in quotes; the csv module knows every end of a line.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [column.strip() for column in next(reader)]
        if len(set(header)) != len(header):
            raise UserError(f"{folder.shown(name)}: its header has {_listed(header)}, expected each once; correct it")
        image, caption = _columns(folder, name, header, "its header")
        for row in reader:
            place = f"line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                yield Record(
                    place, None, [], problem=f"it has {len(row)} columns, expected the {len(header)} of the header"
                )
                continue
            one = dict(zip(header, row, strict=True))
            yield Record(place, one[image], [one[caption]], _optional(one.get("split")), _id(one))
    except csv.Error as error:
        raise UserError(
            f"{folder.shown(name)}: line {reader.line_num} is no {name.rpartition('.')[2].upper()} ({error}), "
            "expected a quote to be closed where it stands, and doubled within quotes; correct it"
        ) from error


def _columns(folder: DataFolder, name: str, names: Collection[str], place: str) -> tuple[str, str]:
    """The names of picture and caption among those that there are; an error unless there is one of each."""
    chosen = []
    for what, known in (("picture", IMAGE_NAMES), ("caption", CAPTION_NAMES)):
        found = [column for column in names if column.lower() in known]
        if len(found) != 1:
            problem = f"{' and '.join(found)} for the {what}" if found else f"none for the {what}"
            raise UserError(
                f"{folder.shown(name)}: {place} has the columns {_listed(names)}: {problem}, expected one of "
                f"{', '.join(known)}; rename or remove columns"
            )
        chosen.append(found[0])
    return chosen[0], chosen[1]


def _listed(names: Any) -> str:
    if not isinstance(names, Collection) or isinstance(names, str):
        return type(names).__name__
    shown = [one_line(str(name), 40) for name in list(names)[:12]]
    return ", ".join([*shown, "..."] if len(names) > 12 else shown) or "nothing"


def _optional(value: object) -> str | None:
    return None if value is None or value == "" else str(value)


def _id(one: dict[str, Any]) -> str | None:
    return next((str(one[name]) for name in _ID_NAMES if one.get(name) not in (None, "")), None)
