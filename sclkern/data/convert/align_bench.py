"""ALIGN-BENCH: pictures, a caption, and the regions of its words as boxes and masks."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from sclkern.data.convert.annotations import read_pickle
from sclkern.data.convert.plan import STRINGS, Listing, Options, Plan, Row, Table
from sclkern.data.files import DataFolder
from sclkern.errors import UserError

_COLUMNS = pa.schema(
    [
        ("caption", STRINGS),
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("words", STRINGS),
        # Of each word: boxes x1, y1, x2, y2 in pixels, and masks of the picture's size as PNG.
        ("boxes", pa.list_(pa.list_(pa.list_(pa.float64())))),
        ("masks", pa.list_(pa.list_(pa.binary()))),
    ]
)
_EXPECTED = "{'caption', 'annotation': {word: [{'bbox_mask', 'pixel_mask'}]}}"


def plan_align_bench(source: DataFolder, options: Options) -> Plan:
    """ALIGN-BENCH: images/<i>.jpg, pkls/<i>.pkl."""
    plan, listing = Plan(), Listing(source)
    names = [name for name in listing.names("pkls") if name.endswith(".pkl")]
    rows = []
    for name in sorted(names, key=lambda name: (len(name), name)):
        identifier = name.removesuffix(".pkl")
        picture = f"images/{identifier}.jpg"
        plan.count("pictures")
        if not listing.has(picture):
            plan.missing.add("pictures of images/", picture)
            continue
        content = read_pickle(source, f"pkls/{name}", _EXPECTED)
        try:
            words, boxes, masks = _regions(content["annotation"])
            captions = plan.captions([content["caption"]], picture)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{source.shown(f'pkls/{name}')}: has no {error}, expected {_EXPECTED}; download it again"
            ) from error
        plan.count("words with regions", len(words))
        if captions:
            rows.append(Row((picture,), (captions, identifier, "test", words, boxes, masks)))
        else:
            plan.dropped.add("pictures without a caption", picture)
    plan.tables = [Table("align_bench", _COLUMNS, rows)]
    return plan


def _regions(annotation: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[Any], list[Any]]:
    words, boxes, masks = list[str](), list[Any](), list[Any]()
    for word, regions in annotation.items():
        words.append(str(word))
        boxes.append([[float(edge) for edge in region["bbox_mask"]] for region in regions])
        masks.append([_png(np.asarray(region["pixel_mask"], dtype=bool)) for region in regions])
    return words, boxes, masks


def _png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, "PNG")
    return buffer.getvalue()
