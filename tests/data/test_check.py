"""``sclkern data check`` finds each planted defect and nothing else, and its page shows every text as it is."""

from __future__ import annotations

import base64
import io
import json
import uuid
from html.parser import HTMLParser
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from PIL import Image

from caption_files import picture, sample, write_pictures, write_samples, write_tar
from defective_data import DEFECTIVE, HOSTILE, defective_records, defective_tars
from sclkern.cli import main
from sclkern.data.check import Finding, Report, examine
from sclkern.data.check.page import page
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.text import one_line
from sclkern.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCLKERN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_the_shipped_data_is_clean() -> None:
    report = examine("demo", workers=1)
    assert (report.images, report.pairs, report.format, report.defects) == (1258, 2481, "arrow", [])
    assert report.splits["val"] == {"images": 124, "pairs": 251}
    assert sum(of["pairs"] for of in report.splits.values()) == report.pairs
    assert report.widths == (64, 64, 64) and report.sides["64 to 127"] == 1258


@pytest.mark.parametrize("format", DEFECTIVE)
@pytest.mark.parametrize("workers", [1, 2])
def test_each_defect_is_found_and_nothing_else(root: Path, format: str, workers: int) -> None:
    planted = DEFECTIVE[format](root)
    report = examine(str(root), workers=workers)
    assert report.format == format
    assert [(found.kind, found.name) for found in report.defects] == [(kind, name) for kind, name, _ in planted]
    for found, (_, _, reason) in zip(report.defects, planted, strict=True):
        assert reason in found.reason and "\n" not in found.reason


def test_what_is_counted(root: Path) -> None:
    defective_records(root)
    report = examine(str(root), workers=1)
    assert (report.images, report.pairs, report.captions) == (6, 11, 10)
    assert report.splits == {
        "train": {"images": 2, "pairs": 7}, "val": {"images": 1, "pairs": 1}, "test": {"images": 3, "pairs": 3},
    }  # fmt: skip
    assert (report.equal_images, report.equal_captions) == (1, 1)
    assert report.widths == (32, 32, 32) and report.heights == (24, 24, 24)
    assert report.sides["under 64"] == sum(report.sides.values()) == 5
    assert examine(str(root), split="val", workers=1).images == 1
    text = str(report)
    assert "splits:        train 2 images, 7 pairs; val 1 image, 1 pair; test 3 images, 3 pairs" in text
    assert "defects:       6" in text and "\x1b" not in text and "\u202e" not in text


def test_captions_that_are_cut_and_rows_without_success_are_no_defects(root: Path) -> None:
    failed = [("b.json", b'{"status": "failed_to_download"}')]
    write_tar(root / "t.tar", [*sample("a", 0, "cat " * 60), *failed, *sample("c", 1)])
    report = examine(str(root), max_text_len=30, workers=1)
    assert (report.cut, report.dropped, report.defects) == (1, {"failed_to_download": 1}, [])
    assert report.caption_tokens[2] > 60


def test_a_defect_that_was_repaired_is_gone(root: Path) -> None:
    defective_records(root)
    assert any("missing.jpg" in found.reason for found in examine(str(root), workers=1).defects)
    (root / "images" / "missing.jpg").write_bytes(picture(9))
    assert not any("missing.jpg" in found.reason for found in examine(str(root), workers=1).defects)


def test_one_file_or_some_tables(root: Path) -> None:
    defective_tars(root)
    assert examine(str(root / "00004.tar"), workers=1).images == 1
    report = examine(str(root), tables=["{00000,00004}"], workers=1)
    assert (report.images, report.defects) == (5, [])
    with pytest.raises(UserError, match=r"no file x\*.tar, expected one or more"):
        examine(str(root), tables=["x*"], format="tar", workers=1)


def test_a_table_behind_a_link_out_of_the_folder_is_named_and_the_others_are_read(root: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "elsewhere.tar", 3)
    write_samples(root / "a.tar", 2)
    (root / "b.tar").symlink_to(tmp_path / "elsewhere.tar")
    report = examine(str(root), workers=1)
    ((kind, name, reason),) = ((one.kind, one.name, one.reason) for one in report.defects)
    assert (report.images, kind, name) == (2, "table that cannot be read", "b.tar")
    assert "a symbolic link leads out of the folder" in reason


def test_img2datasets_statistics_are_no_table(root: Path) -> None:
    write_samples(root / "00000.tar", 2)
    (root / "00000_stats.json").write_text("{}")
    assert examine(str(root), workers=1).tables == ["00000.tar"]


def test_data_behind_a_url(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe(f"{url}/t.tar", write_samples(tmp_path / "t.tar", 3).read_bytes())
    assert examine(url, workers=1).images == examine(f"{url}/t.tar", workers=1).images == 3


def check(*arguments: object) -> int:
    return main(["data", "check", *map(str, arguments)])


def test_exit_status_and_files(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(root / "t.tar", 3)
    assert check(root, "--workers", 1, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html") == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["ok"] is True and content["images"] == 3 and content["defects"] == []
    assert (tmp_path / "a.html").read_text().count("<figure>") == 3
    (root / "t.tar").write_bytes(b"x")
    assert check(root, "--workers", 1, "--json", tmp_path / "a.json") == 1
    (defect,) = json.loads((tmp_path / "a.json").read_text())["defects"]
    assert defect["name"] == "t.tar" and "is no tar" in defect["reason"]
    assert "table that cannot be read: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["missing"], "missing: no such folder"),
        ([""], "no data of a known format"),
        (["", "--format", "parquet"], "--format: got 'parquet', expected one of auto, "),
        (["", "--format", "tar"], "no file *.tar, expected one or more"),
        (["", "--workers", "0"], "--workers: got 0, expected 1 or more"),
        (["t.csv", "--tables", "t"], "expected a folder; leave one of them out"),
        (["t.csv", "--tokenizer", "/no/ne"], "no such directory, expected a Hugging Face tokenizer"),
    ],
)
def test_usage(root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    if arguments[0] == "t.csv":
        (root / "t.csv").write_text("image,caption\n")
    assert check(root / arguments[0], *arguments[1:]) == 2
    assert part in capsys.readouterr().err


def write_columns(path: Path, columns: dict[str, pa.Array]) -> None:
    table = pa.table(columns)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def test_tables_of_vqa_and_nlvr2_are_read_beside_those_of_captions(root: Path) -> None:
    write_pairs(root / "captions.arrow", [{"image": picture(0), "caption": ["a cat"]}])
    write_columns(
        root / "nlvr2_dev.arrow",
        {"image_0": pa.array([picture(1)]), "image_1": pa.array([b"x"]), "questions": pa.array([["a", "b"]])},
    )
    questions = pa.array([["what"], ["who"]])
    columns = {"image": pa.array([picture(2), picture(3)]), "questions": questions, "split": pa.array(["val", "test"])}
    write_columns(root / "vqav2_val.arrow", {**columns, "image_id": pa.array([7, 7])})
    write_columns(root / "other.arrow", {"image": pa.array([picture(4)])})
    report = examine(str(root), workers=1)
    assert (report.images, report.pairs) == (5, 7)
    assert [(one.kind, one.name) for one in report.defects] == [
        ("table that cannot be read", "other.arrow"),
        ("picture that cannot be used", "nlvr2_dev.arrow row 0 image_1"),
        ("id in two splits", "vqav2_val.arrow row 1"),
    ]


class Page(HTMLParser):
    """Elements, texts and pictures of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[bytes] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "img":
            kind, _, data = str(dict(attrs)["src"]).partition(",")
            assert kind == "data:image/jpeg;base64"
            self.images.append(base64.b64decode(data))
        elif tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_a_page_shows_every_text_as_it_is(root: Path) -> None:
    defective_records(root)
    html = page(examine(str(root), samples=10, workers=1))
    shown = Page(html)
    assert shown.open == [] and "script" not in shown.tags and "b" not in shown.tags
    assert shown.tags.count("figure") == len(shown.images) == 5 and shown.tags.count("h1") == 1
    for caption in HOSTILE:
        assert one_line(caption) in shown.texts
    for image in shown.images:
        assert Image.open(io.BytesIO(image)).size == (32, 24)
    assert shown.tags.count("li") == 6 and "no such picture: missing.jpg" in shown.texts
    assert "http" not in html.replace("http-equiv", "").replace("https://", "")


def test_a_page_spreads_its_samples_and_shrinks_them(root: Path) -> None:
    write_pictures(root, [f"{n}.jpg" for n in range(9)])
    (root / "4.jpg").write_bytes(picture(4, size=(900, 450)))
    (root / "t.jsonl").write_text("".join(f'["{n}.jpg", ["{n}", "b", "c", "d", "e", "f", "g"]]\n' for n in range(9)))
    report = examine(str(root), samples=3, workers=1)
    assert [one.captions[0] for one in report.samples] == ["0", "4", "8"]
    assert report.samples[1].size == (900, 450) and report.samples[1].num_captions == 7
    assert Image.open(io.BytesIO(report.samples[1].thumbnail)).size == (192, 96)
    assert "and 2 more" in Page(page(report)).texts


def test_a_page_without_anything() -> None:
    report = Report("x", "tar", ["t.tar"], defects=[Finding("table that cannot be read", "t.tar", "<i>")])
    assert Page(page(report)).tags.count("li") == 1 and "<i>" not in page(report)
