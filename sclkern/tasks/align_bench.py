"""ALIGN-BENCH: how much of a model's attention to a picture lies on the regions of the words (GLSCL's benchmark).

A score is ``sum(m a) / sum(a)`` over the patches: a the attention of the last fusion layer from the text to the
picture, the largest over the heads, without the picture's CLS; m the region, resized to the patches.

- Global: a is that of the caption's CLS, m the union of the regions of all words, without those whose box covers more
  than 90 % of the picture. The mean over pictures; one whose regions are all so large, or that has none, scores 0.
- Local: a is that of an annotated word, its tokens summed, and those of all words of a phrase; m the union of its
  regions. The mean over the words of a picture, then over pictures that have one. "." and "," are no part of a word; a
  word that is not in the caption counts as its first.

Both by box and by pixel mask.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from sclkern.data.files import DataFolder
from sclkern.data.images import decode_image
from sclkern.data.roots import resolve_root
from sclkern.data.sources.arrow import read_batches
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import normalize_images
from sclkern.distributed import merge, world_size
from sclkern.errors import UserError
from sclkern.models import SCLNetwork
from sclkern.visualize.maps import attention_maps, record

TABLE = "align_bench"
_COLUMNS = ("image", "caption", "words", "boxes", "masks")
_BACKGROUND = 0.9
_DROPPED = (".", ",")
_REMEDY = "convert the set again with sclkern data convert align-bench"


class Regions(NamedTuple):
    """Where a word is seen.

    Attributes:
        boxes: (R, 4) x1, y1, x2, y2 in pixels.
        masks: (R, H, W) bool, of the picture's size.
    """

    boxes: np.ndarray
    masks: np.ndarray


class Annotated(NamedTuple):
    """A picture with the regions of its words.

    Attributes:
        name: for messages.
        image: mode RGB.
        caption: its text.
        regions: by word or phrase.
    """

    name: str
    image: Image.Image
    caption: str
    regions: dict[str, Regions]


class AlignBench:
    """The table that ``sclkern data convert align-bench`` writes.

    Args:
        root: folder of the table, or an fsspec URL.
        table: its name, without ``.arrow``.

    Raises:
        UserError: the table is missing, or of another set.
    """

    def __init__(self, root: str | Path, table: str = TABLE) -> None:
        folder = DataFolder(resolve_root(root))
        name = f"{table}.arrow"
        if folder.info(name) is None:
            raise UserError(f"{folder.shown(name)}: no such table; sclkern data convert align-bench writes it")
        self._name = folder.shown(name)
        self._table = pa.Table.from_batches(read_batches(folder.local_copy(name)))
        if lacking := [column for column in _COLUMNS if column not in self._table.schema.names]:
            raise UserError(f"{self._name}: no column {lacking[0]!r}, expected a table of ALIGN-BENCH; {_REMEDY}")
        if not len(self):
            raise UserError(f"{self._name}: has no picture, expected one or more; {_REMEDY}")

    def __len__(self) -> int:
        """Number of pictures."""
        return int(self._table.num_rows)

    @property
    def digest(self) -> str:
        """Changes with the captions, words and boxes."""
        asked = [self._table.column(name).to_pylist() for name in ("caption", "words", "boxes")]
        return hashlib.blake2b(json.dumps(asked).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def __getitem__(self, number: int) -> Annotated:
        """A picture; raises a ``UserError`` if it cannot be decoded, or its regions are not of its size."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = {column: self._table.column(column)[number].as_py() for column in _COLUMNS}
        name = f"{self._name} row {number}"
        try:
            image = decode_image(row["image"])
            regions = {
                word: Regions(np.array(boxes, dtype=float).reshape(len(boxes), 4), _masks(masks, image.size))
                for word, boxes, masks in zip(row["words"], row["boxes"], row["masks"], strict=True)
            }
        except (ValueError, TypeError) as error:
            raise UserError(f"{name}: {error}; {_REMEDY}") from error
        return Annotated(name, image, row["caption"][0], regions)


def _masks(encoded: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    masks = [np.asarray(Image.open(io.BytesIO(mask)).convert("1")) for mask in encoded]
    for height, width in (mask.shape for mask in masks):
        if (width, height) != size:
            raise ValueError(f"a mask is {width} x {height}, expected the size of the picture, {size[0]} x {size[1]}")
    return np.stack(masks) if masks else np.zeros((0, *size[::-1]), dtype=bool)


def region_score(attention: Tensor | np.ndarray, region: np.ndarray) -> float:
    """Share of an attention map that lies in a region.

    Args:
        attention: (G, G), 0 or more.
        region: (H, W) bool; resized to the patches by bicubic interpolation with Pillow's filter, to [0, 1].

    Returns:
        In [0, 1]; NaN of an attention that is NaN or 0 everywhere.
    """
    a = np.asarray(attention, dtype=np.float64)
    pixels = Image.fromarray(region.astype(np.float32))
    m = np.asarray(pixels.resize((a.shape[1], a.shape[0]), Image.Resampling.BICUBIC), dtype=np.float64).clip(0, 1)
    total = a.sum()
    return float((m * a).sum() / total) if total else math.nan


def _union(regions: Sequence[Regions], form: str, *, background: bool) -> np.ndarray | None:
    """(H, W) bool of all regions in one form, "box" or "mask"; None where there is none."""
    found: np.ndarray | None = None
    for boxes, masks in regions:
        for box, mask in zip(boxes, masks, strict=True):
            height, width = mask.shape
            x1, y1, x2, y2 = box
            if not background and (x2 - x1) * (y2 - y1) > _BACKGROUND * height * width:
                continue
            region = mask
            if form == "box":
                region = np.zeros((height, width), dtype=bool)
                left, top = max(0, int(x1)), max(0, int(y1))
                region[top : max(top, int(y2)), left : max(left, int(x2))] = True
            found = region if found is None else found | region
    return found


def caption_words(tokenizer: CaptionTokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Words of a caption as ALIGN-BENCH takes them.

    Args:
        tokenizer: the model's.
        ids: of the caption, ``<s>`` and ``</s>`` included.

    Returns:
        Each word with the positions of its tokens; tokens "." and "," are left out.
    """
    words = []
    for word, positions in tokenizer.words(ids):
        kept = [position for position in positions if tokenizer.decode([ids[position]]).strip() not in _DROPPED]
        if kept:
            whole = len(kept) == len(positions)
            words.append((word if whole else tokenizer.decode([ids[p] for p in kept]).strip(), kept))
    return words


def score_picture(
    attention: Tensor | np.ndarray, words: Sequence[tuple[str, Sequence[int]]], regions: Mapping[str, Regions]
) -> tuple[dict[str, float], int]:
    """The scores of a picture.

    Args:
        attention: (Lt, G, G) of each token of the caption, ``<s>`` first.
        words: of ``caption_words``.
        regions: by word or phrase.

    Returns:
        "global_box" and "global_mask", and of a picture with annotated words "local_box" and "local_mask"; and how many
        words were not in the caption.
    """
    attention = np.asarray(attention, dtype=np.float64)
    scores: dict[str, float] = {}
    for form in ("box", "mask"):
        union = _union(list(regions.values()), form, background=False)
        scores[f"global_{form}"] = 0.0 if union is None else region_score(attention[0], union)
    names, missing = [name for name, _ in words], 0
    local: dict[str, list[float]] = {"box": [], "mask": []}
    for phrase, of_word in regions.items():
        positions: list[int] = []
        parts = [part.strip("".join(_DROPPED)) for part in phrase.split()]
        for part in [part for part in parts if part] or [phrase]:
            missing += part not in names
            positions += words[names.index(part) if part in names else 0][1] if words else [0]
        a = attention[positions].sum(0)
        for form, values in local.items():
            union = _union([of_word], form, background=True)
            values.append(0.0 if union is None else region_score(a, union))
    if regions:
        scores |= {f"local_{form}": math.fsum(values) / len(values) for form, values in local.items()}
    return scores, missing


@dataclass(frozen=True)
class AlignResult:
    """Scores of a model.

    Attributes:
        scores: fractions, "global_box", "global_mask", "local_box", "local_mask"; and under "chance_global_box" and so
            on what attention to all patches alike scores.
        pictures: how many.
        words: annotated words and phrases.
        not_found: words of them that are not in the caption, each counted as its first.
        cut: captions that are longer than the model takes, and were cut.
    """

    scores: dict[str, float]
    pictures: int
    words: int
    not_found: int
    cut: int


@torch.no_grad()
def evaluate_align_bench(
    model: SCLNetwork,
    bench: AlignBench,
    tokenizer: CaptionTokenizer,
    transform: Callable[[Image.Image], Tensor],
    *,
    between_pictures: Callable[[], object] = lambda: None,
    distributed: bool = False,
) -> AlignResult:
    """Score a model, one picture at a time.

    Args:
        model: with one fusion layer at least; put into eval mode meanwhile.
        bench: the pictures.
        tokenizer: the model's.
        transform: maps a PIL image to (3, S, S), uint8 or normalised floats, and keeps the whole picture: "clip_test";
            published at 288 pixels.
        between_pictures: called before each picture; may raise.
        distributed: whether all ranks of the default process group call this, with the same weights, and share the
            pictures. All return the same, which is what one process returns.

    Returns:
        The scores.

    Raises:
        UserError: a picture or its regions cannot be used, or the model has no fusion layer.
    """
    if not model.config.fusion_layers:
        raise UserError("the model has no fusion layer (fusion_layers 0), whose attention is scored; give another")
    ranks = world_size() if distributed else 1
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    was_training, grid = model.training, model.config.grid
    model.eval()
    found: dict[int, tuple[dict[str, float], int, int, bool]] = {}
    for number in range(rank, len(bench), ranks):
        between_pictures()
        picture = bench[number]
        whole, _ = tokenizer([picture.caption], 1 << 20)
        ids, _ = tokenizer([picture.caption], model.config.max_text_len)
        recorded = record(model, normalize_images(transform(picture.image)), ids[0])
        attention = attention_maps(recorded).text_to_image[:, 1:].unflatten(1, (grid, grid)).cpu()
        words = caption_words(tokenizer, ids[0].tolist())
        scores, missing = score_picture(attention, words, picture.regions)
        uniform, _ = score_picture(torch.ones_like(attention), words, picture.regions)
        scores |= {f"chance_{name}": value for name, value in uniform.items()}
        found[number] = scores, len(picture.regions), missing, ids.shape != whole.shape
    model.train(was_training)
    found = found if ranks == 1 else merge(found)
    names = dict.fromkeys(name for scores, *_ in found.values() for name in scores)
    # Sums that do not depend on the order, so not on the number of ranks.
    of_name = {name: [scores[name] for scores, *_ in found.values() if name in scores] for name in names}
    return AlignResult(
        {name: math.fsum(values) / len(values) for name, values in of_name.items()},
        pictures=len(found),
        words=sum(words for _, words, _, _ in found.values()),
        not_found=sum(missing for _, _, missing, _ in found.values()),
        cut=sum(cut for *_, cut in found.values()),
    )
