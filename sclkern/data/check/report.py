"""What an examination of data has found, as plain values and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sclkern.data.text import one_line

# Findings of one kind that the text lists.
_SHOWN = 20
# Upper ends of the classes of the shorter side, in pixels; the last class has none.
SIDES = (64, 128, 224, 256, 384, 512, 1024, 2048)


@dataclass(frozen=True)
class Finding:
    """A defect.

    Attributes:
        kind: what is wrong; findings of one kind are listed together.
        name: of the sample or the file.
        reason: in one line.
    """

    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A picture to look at.

    Attributes:
        name: of the picture.
        captions: its first captions.
        num_captions: how many it has.
        split: of the picture; None where there are none.
        size: width and height in pixels.
        thumbnail: JPEG.
    """

    name: str
    captions: list[str]
    num_captions: int
    split: str | None
    size: tuple[int, int]
    thumbnail: bytes


@dataclass
class Report:
    """Counts and defects of some data.

    Attributes:
        root: the folder or URL.
        format: of the data.
        tables: files that were examined.
        images: images, of which ``undecodable`` ones cannot be used.
        pairs: pairs of an image and a caption.
        captions: distinct captions.
        splits: images and pairs of each split; empty where there are none.
        image_bytes: bytes of all encoded images; 0 where a format does not tell.
        widths: least, median and greatest width in pixels.
        heights: the same of heights.
        sides: images by the class of ``SIDES`` that their shorter side belongs to.
        caption_tokens: least, median and greatest number of tokens.
        max_text_len: tokens that a caption is cut to.
        cut: captions that are longer.
        equal_images: images that are copies of an earlier one, byte by byte.
        equal_captions: captions that belong to several images.
        dropped: rows that are known to have no image, by reason.
        defects: everything that is wrong.
        samples: pictures to look at.
    """

    root: str
    format: str
    tables: list[str]
    images: int = 0
    pairs: int = 0
    captions: int = 0
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    image_bytes: int = 0
    widths: tuple[int, int, int] = (0, 0, 0)
    heights: tuple[int, int, int] = (0, 0, 0)
    sides: dict[str, int] = field(default_factory=dict)
    caption_tokens: tuple[int, int, int] = (0, 0, 0)
    max_text_len: int = 0
    cut: int = 0
    equal_images: int = 0
    equal_captions: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    defects: list[Finding] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything but the samples, as plain types; ``ok`` is whether there are no defects."""
        content = asdict(self)
        del content["samples"]
        return {"ok": not self.defects, **content}

    def facts(self) -> list[tuple[str, str]]:
        """Title and text of each fact, in order; what does not apply is left out."""
        each = f", {self.pairs / self.images:.1f} an image" if self.images else ""
        facts = [
            ("data", f"{one_line(self.root, 200)} ({self.format}, {_count(len(self.tables), 'table')})"),
            ("images", f"{self.images:,}{f', {self.image_bytes / 1e6:,.1f} MB' if self.image_bytes else ''}"),
            ("pairs", f"{self.pairs:,}{each}; {_count(self.captions, 'distinct caption')}"),
        ]
        if self.splits:
            facts.append(
                ("splits", "; ".join(
                    f"{one_line(name, 60)} {_count(of['images'], 'image')}, {_count(of['pairs'], 'pair')}"
                    for name, of in self.splits.items()
                ))
            )  # fmt: skip
        if any(self.sides.values()):
            facts += [
                ("width", "{:,} to {:,} px, median {:,}".format(*(self.widths[i] for i in (0, 2, 1)))),
                ("height", "{:,} to {:,} px, median {:,}".format(*(self.heights[i] for i in (0, 2, 1)))),
                ("shorter side", "; ".join(f"{name} px {count:,}" for name, count in self.sides.items() if count)),
            ]
        if self.caption_tokens[2]:
            tokens = "{} to {} tokens, median {}".format(*(self.caption_tokens[i] for i in (0, 2, 1)))
            facts.append(("captions", f"{tokens}; cut to {self.max_text_len}: {self.cut:,}"))
        facts.append(
            ("repeated", f"{_count(self.equal_images, 'image')} equal to an earlier one; "
             f"{_count(self.equal_captions, 'caption')} of several images")
        )  # fmt: skip
        if self.dropped:
            reasons = ", ".join(f"{one_line(reason, 60)} {count:,}" for reason, count in self.dropped.items())
            facts.append(("without image", f"{_count(sum(self.dropped.values()), 'row')}: {reasons}"))
        return facts

    def by_kind(self) -> dict[str, list[Finding]]:
        """The defects by their kind."""
        kinds: dict[str, list[Finding]] = {}
        for defect in self.defects:
            kinds.setdefault(defect.kind, []).append(defect)
        return kinds

    def __str__(self) -> str:
        lines = [f"{title + ':':15}{text}" for title, text in self.facts()]
        lines.append(f"{'defects:':15}{len(self.defects) or 'none'}")
        for kind, findings in self.by_kind().items():
            lines.append(f"  {kind}: {len(findings)}")
            lines += [f"    {one_line(f.name, 200)}: {one_line(f.reason, 300)}" for f in findings[:_SHOWN]]
            if len(findings) > _SHOWN:
                lines.append(f"    and {len(findings) - _SHOWN} more (--json FILE and --html FILE list them)")
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
