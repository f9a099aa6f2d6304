"""Reading of everything that a source has, on every core."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sclkern.data.check.report import SIDES, Finding, Report, Sample
from sclkern.data.check.tables import Opened, open_tables
from sclkern.data.digest import first_pairs
from sclkern.data.images import decode_image
from sclkern.data.parallel import cores, map_in_processes
from sclkern.data.text import one_line
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.undecodable import read_image
from sclkern.errors import UserError

_CHUNK = 64
_CAPTIONS = 4096
_THUMBNAIL = 192
# Pictures of which a page can show the captions.
_CAPTIONS_SHOWN = 5


class _Seen(NamedTuple):
    """An image that was read: digest of its bytes, their number, width, height; ``reason`` where it cannot be used."""

    digest: bytes
    size: int
    width: int
    height: int
    reason: str | None


def examine(
    target: str,
    *,
    tables: Sequence[str] = (),
    split: str | None = None,
    format: str = "auto",
    tokenizer: str = "demo",
    max_text_len: int = 50,
    min_size: int = 16,
    samples: int = 0,
    workers: int | None = None,
) -> Report:
    """Read every picture and every caption of some data.

    Args:
        target: folder of the data, local or an fsspec URL, or one of its files.
        tables: names as ``data.train_tables`` takes them; none reads every table that is there.
        split: part to read; None reads all.
        format: as ``data.format``.
        tokenizer: as ``data.tokenizer``.
        max_text_len: tokens that a caption is cut to.
        min_size: least height and width of a picture in pixels: the side of a patch.
        samples: pictures to keep for a page, evenly spread.
        workers: processes that decode; None is one a core.

    Returns:
        What was found; a table that cannot be read is a defect.

    Raises:
        UserError: there is no such data, or no such tokenizer.
    """
    tokens = CaptionTokenizer.from_pretrained(tokenizer)
    workers = cores() if workers is None else workers
    opened = open_tables(target, tables, split, format)
    report = Report(opened.root, opened.format, opened.tables, max_text_len=max_text_len, defects=opened.defects)
    _count_pairs(report, opened)
    seen = _read_images(opened, min_size, workers)
    _measure(report, opened, seen)
    _compare_splits(report, opened, seen)
    _read_captions(report, opened, tokens, workers)
    if samples:
        _choose_samples(report, opened, seen, samples)
    return report


def _count_pairs(report: Report, opened: Opened) -> None:
    dropped: Counter[str] = Counter()
    for source in opened.sources:
        report.images += source.num_images
        report.pairs += source.num_pairs
        dropped.update(getattr(source, "dropped", {}))
        report.defects += [Finding("sample left out", name, reason) for name, reason in getattr(source, "defects", ())]
    report.dropped = dict(sorted(dropped.items()))
    pairs = np.concatenate([_pairs_of_images(source) for source in opened.sources] or [np.zeros(0, dtype=np.int64)])
    splits = opened.column("split")
    for name in dict.fromkeys(split for split in splits if split is not None):
        mine = np.array([split == name for split in splits])
        report.splits[name] = {"images": int(mine.sum()), "pairs": int(pairs[mine].sum())}


def _pairs_of_images(source: Any) -> np.ndarray:
    return np.bincount(source.pair_image, minlength=source.num_images)


def _read_images(opened: Opened, min_size: int, workers: int) -> list[_Seen]:
    chunks = [
        (number, start, min(start + _CHUNK, source.num_images))
        for number, source in enumerate(opened.sources)
        for start in range(0, source.num_images, _CHUNK)
    ]
    results = map_in_processes(
        partial(_read_chunk, opened.sources, min_size),
        chunks,
        workers=min(workers, len(chunks)),
        description="decoding",
        unit="image",
        total=sum(source.num_images for source in opened.sources),
        size=lambda chunk: chunk[2] - chunk[1],
    )
    return [seen for part in results for seen in part]


def _read_chunk(sources: Sequence[Any], min_size: int, chunk: tuple[int, int, int]) -> list[_Seen]:
    number, start, stop = chunk
    return [_read(sources[number], image, min_size) for image in range(start, stop)]


class _Held:
    """A source of the one image whose bytes were read, so that they are read once."""

    def __init__(self, content: bytes | memoryview) -> None:
        self._content = content

    def image(self, image: int) -> Image.Image:
        return decode_image(self._content)


def _read(source: Any, image: int, min_size: int) -> _Seen:
    digest, size = b"", 0
    try:
        if hasattr(source, "image_bytes"):
            content = source.image_bytes(image)
            digest, size = hashlib.blake2b(content, digest_size=16).digest(), len(content)
            decoded = read_image(_Held(content), 0, min_size)
        else:
            frames = _frames(source, image, min_size)
            hasher = hashlib.blake2b(digest_size=16)
            for frame in frames:  # of a clip all, as many begin with a black one
                hasher.update(frame.tobytes())
            digest = hasher.digest()
            decoded = frames[0]
    except Exception as error:  # readers raise errors of every kind on one bad file
        return _Seen(digest, size, 0, 0, one_line(str(error), 300) or type(error).__name__)
    return _Seen(digest, size, decoded.width, decoded.height, None)


def _frames(source: Any, image: int, min_size: int) -> list[Image.Image]:
    """The image, or all frames of a clip."""
    if not hasattr(source, "frames"):
        return [read_image(source, image, min_size)]
    frames: list[Image.Image] = source.frames(image, lambda count: range(count))
    if not frames:
        raise ValueError("the clip has no frames")
    return frames


def _measure(report: Report, opened: Opened, seen: Sequence[_Seen]) -> None:
    report.image_bytes = sum(one.size for one in seen)
    names = [f"under {SIDES[0]}", *(f"{a} to {b - 1}" for a, b in pairwise(SIDES))]
    names.append(f"{SIDES[-1]} and more")
    good = [one for one in seen if one.reason is None]
    if good:
        widths, heights = (np.array([getattr(one, name) for one in good]) for name in ("width", "height"))
        report.widths, report.heights = _spread(widths), _spread(heights)
        classes = np.bincount(np.searchsorted(SIDES, np.minimum(widths, heights), "right"), minlength=len(names))
        report.sides = dict(zip(names, classes.tolist(), strict=True))
    report.defects += [
        Finding("picture that cannot be used", opened.name(place), one.reason)
        for place, one in enumerate(seen)
        if one.reason is not None
    ]


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _compare_splits(report: Report, opened: Opened, seen: Sequence[_Seen]) -> None:
    splits = opened.column("split")
    copies: dict[bytes, list[int]] = {}
    for place, one in enumerate(seen):
        # An empty file is no picture, of which another could be a copy.
        if one.digest and one.reason is None:
            copies.setdefault(one.digest, []).append(place)
    report.equal_images = sum(len(places) - 1 for places in copies.values())
    image_ids = opened.column("image_id")
    by_id: dict[str, list[int]] = {}
    for place, image_id in enumerate(image_ids):
        if image_id is not None:
            by_id.setdefault(image_id, []).append(place)
    for kind, groups in (("id in two splits", by_id), ("picture in two splits", copies)):
        for places in groups.values():
            first = {splits[place]: place for place in reversed(places) if splits[place] is not None}
            if len(first) < 2:
                continue
            early, late, *_ = sorted(first.values())
            if groups is copies and image_ids[early] is not None and image_ids[early] == image_ids[late]:
                continue  # found by its id
            where = f"is in {splits[late]}, and in {splits[early]} as {one_line(opened.name(early), 200)}"
            report.defects.append(Finding(kind, opened.name(late), where))


def _read_captions(report: Report, opened: Opened, tokenizer: CaptionTokenizer, workers: int) -> None:
    chunks = [
        (number, pairs)
        for number, source in enumerate(opened.sources)
        for pairs in _split(first_pairs(source.pair_group), _CAPTIONS)
    ]
    results = map_in_processes(
        partial(_tokenize_chunk, opened.sources, tokenizer),
        chunks,
        workers=min(workers, len(chunks)),
        description="reading captions",
        unit="caption",
        total=sum(len(pairs) for _, pairs in chunks),
        size=lambda chunk: len(chunk[1]),
    )
    lengths: dict[bytes, int] = {}
    images: Counter[bytes] = Counter()
    for (number, pairs), (digests, tokens, problems) in zip(chunks, results, strict=True):
        source = opened.sources[number]
        of_group = np.bincount(source.pair_group)
        lengths.update(zip(digests, tokens, strict=True))
        for digest, count in zip(digests, of_group[source.pair_group[pairs]].tolist(), strict=True):
            images[digest] += count
        report.defects += [Finding("caption that cannot be used", *problem) for problem in problems]
    report.captions = len(lengths)
    report.equal_captions = sum(count > 1 for count in images.values())
    if lengths:
        values = np.array(list(lengths.values()))
        report.caption_tokens = _spread(values)
        report.cut = int((values > report.max_text_len).sum())


def _split(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _tokenize_chunk(
    sources: Sequence[Any], tokenizer: CaptionTokenizer, chunk: tuple[int, np.ndarray]
) -> tuple[list[bytes], list[int], list[tuple[str, str]]]:
    """Digest and tokens of each caption, and what cannot be tokenized."""
    source = sources[chunk[0]]
    digests, tokens, problems = [], [], []
    for pair in chunk[1].tolist():
        caption = source.caption(pair)
        digests.append(hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        try:
            tokens.append(int(tokenizer([caption], 1 << 30)[1].sum()))
        except UserError as error:
            tokens.append(0)
            problems.append((source.image_name(int(source.pair_image[pair])), str(error)))
    return digests, tokens, problems


def _choose_samples(report: Report, opened: Opened, seen: Sequence[_Seen], count: int) -> None:
    splits = opened.column("split")
    good = np.flatnonzero([one.reason is None for one in seen])
    for place in good[np.unique(np.linspace(0, len(good) - 1, min(count, len(good))).astype(int))].tolist():
        source, image = opened.locate(place)
        picture = _frames(source, image, 1)[0]
        size = picture.size
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        first, last = np.searchsorted(source.pair_image, [image, image + 1]).tolist()
        captions = [source.caption(pair) for pair in range(first, min(last, first + _CAPTIONS_SHOWN))]
        report.samples.append(
            Sample(opened.name(place), captions, last - first, splits[place], size, buffer.getvalue())
        )
