"""Data with known defects, in every format: what ``sclkern data check`` must find, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from caption_files import bomb, picture, sample, write_pictures, write_samples, write_tar
from sclkern.data.sources.arrow import write_pairs

# Texts that a page must show and never obey.
HOSTILE = [
    "<script>document.title = 'obeyed'</script>",
    '"><img src=x onerror="document.title=\'obeyed\'">',
    "</figcaption></figure></div><h1>outside</h1>",
    "&lt;b&gt; a & b",
    "\u202eright to left\x1b[31m\n\n<b>new line</b>",
]
Found = list[tuple[str, str, str]]


def defective_tars(root: Path) -> Found:
    """Five tars; returns kind, name and a part of the reason of each defect."""
    write_samples(root / "00000.tar", 4)
    broken = [
        *sample("a", 10),
        ("b.jpg", picture(11)), ("b.txt", b"\xff"),
        ("c.txt", b"no picture"),
        ("d.jpg", picture(12)[:200]), ("d.txt", b"cut"),
        ("e.png", bomb()), ("e.txt", b"bomb"),
        ("f.jpg", b""), ("f.txt", b"empty"),
        ("g.png", picture(13, size=(200, 8), format="PNG")), ("g.txt", b"flat"),
    ]  # fmt: skip
    write_tar(root / "00001.tar", broken)
    write_tar(root / "00002.tar", [*sample("x", 20), *sample("x", 21)])
    whole = write_samples(root / "00003.tar", 2, first=30).read_bytes()
    (root / "00003.tar").write_bytes(whole[: len(whole.rstrip(b"\0")) - 100])
    write_samples(root / "00004.tar", 1, first=40)
    return [
        ("table that cannot be read", "00002.tar", "has x.jpg twice"),
        ("table that cannot be read", "00003.tar", "cut short"),
        ("sample left out", "00001.tar b", "not in UTF-8"),
        ("sample left out", "00001.tar c", "no picture"),
        ("picture that cannot be used", "00001.tar d", "Truncated File Read"),
        ("picture that cannot be used", "00001.tar e", "unfolds to"),
        ("picture that cannot be used", "00001.tar f", "it is empty"),
        ("picture that cannot be used", "00001.tar g", "smaller than a patch (16)"),
    ]


def defective_records(root: Path) -> Found:
    """Karpathy's JSON with pictures; returns the defects."""
    write_pictures(root, [f"images/{n}.jpg" for n in range(6)])
    (root / "images" / "copy.jpg").write_bytes((root / "images" / "1.jpg").read_bytes())
    (root / "images" / "broken.jpg").write_bytes(b"<html>")

    def image(name: str, split: str, number: int, *captions: str) -> dict[str, object]:
        return {"filename": name, "split": split, "cocoid": number, "sentences": [{"raw": c} for c in captions]}

    images = [
        image("0.jpg", "train", 0, *HOSTILE),
        image("1.jpg", "train", 1, "one", "one", "another"),
        image("2.jpg", "val", 2, "two"),
        image("3.jpg", "test", 1, "three"),
        image("copy.jpg", "test", 4, "one"),
        image("broken.jpg", "test", 5, "five"),
        image("missing.jpg", "test", 6, "six"),
        image("../secret.jpg", "test", 7, "seven"),
        image("4.jpg", "test", 8, " "),
    ]
    (root / "dataset.json").write_text(json.dumps({"images": images}))
    return [
        ("sample left out", "dataset.json image 6", "no such picture: missing.jpg"),
        ("sample left out", "dataset.json image 7", "leads out of the folder"),
        ("sample left out", "dataset.json image 8", "the caption is blank"),
        ("picture that cannot be used", "dataset.json: images/broken.jpg (test)", "it is an HTML page"),
        ("id in two splits", "dataset.json: images/3.jpg (test)", "is in test, and in train as dataset.json: images/1"),
        ("picture in two splits", "dataset.json: images/copy.jpg (test)", "is in test, and in train as dataset.json"),
    ]


def defective_arrow(root: Path) -> Found:
    """Two arrow files, one cut short; returns the defects."""
    rows = [
        {"image": picture(n), "caption": [f"caption {n}", "the same"], "image_id": f"{n}", "split": split}
        for n, split in enumerate(["train", "train", "val"])
    ]
    rows.append({"image": b"\xff\xd8 no picture", "caption": ["x"], "image_id": "3", "split": "val"})
    rows.append({"image": picture(0), "caption": ["y"], "image_id": "0", "split": "val"})
    write_pairs(root / "good.arrow", rows)
    content = (root / "good.arrow").read_bytes()
    (root / "cut.arrow").write_bytes(content[: len(content) // 2])
    return [
        ("table that cannot be read", "cut.arrow", "expected a whole arrow IPC file"),
        ("picture that cannot be used", "good.arrow row 3 (3)", "Pillow reads no such file"),
        ("id in two splits", "good.arrow row 4 (0)", "is in val, and in train as good.arrow row 0 (0)"),
    ]


DEFECTIVE = {"tar": defective_tars, "records": defective_records, "arrow": defective_arrow}
