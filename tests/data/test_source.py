"""Formats are registered by name, detected from the files of a folder, or named by module and class."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sclkern.data import SOURCES, PairSource, index_captions, open_pairs, register_source
from sclkern.data.sources.arrow import ArrowPairs, write_pairs
from sclkern.errors import UserError

READER = """
import json
from sclkern.data import index_captions
from sclkern.data.images import decode_image

class JsonPairs:
    def __init__(self, root, tables, split):
        self.root = root
        rows = [row for table in tables for row in json.loads((root / f"{table}.json").read_text())]
        self.files = [row["file"] for row in rows if split in (None, row["split"])]
        self.texts, self.pair_image, self.pair_group = index_captions([row["captions"] for row in rows])
        self.num_images, self.num_pairs = len(self.files), len(self.texts)

    def caption(self, pair):
        return self.texts[pair]

    def image(self, image):
        return decode_image((self.root / self.files[image]).read_bytes())

    def image_name(self, image):
        return self.files[image]
"""


def write_arrow(folder: Path, name: str = "t") -> None:
    write_pairs(folder / f"{name}.arrow", [{"image": b"1", "caption": ["a cat"]}])


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second format, "lines": files NAME.txt."""
    monkeypatch.setattr("sclkern.data.source.SOURCES", dict(SOURCES))
    register_source("lines", pattern="{table}.txt")(lambda root, tables, split: (root, list(tables), split))


def message_of(*args: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_pairs(*args, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", ["auto", "arrow"])
def test_the_arrow_reader_is_registered(tmp_path: Path, format: str) -> None:
    write_arrow(tmp_path)
    source: PairSource = open_pairs(tmp_path, ["t"], format=format)
    assert isinstance(source, ArrowPairs) and source.caption(0) == "a cat"
    with pytest.raises(ValueError, match="cannot be decoded"):
        source.image(0)


def test_every_module_of_the_folder_is_imported() -> None:
    folder = Path(importlib.import_module("sclkern.data.sources").__file__ or "").parent
    for file in folder.glob("[a-z]*.py"):
        assert f"sclkern.data.sources.{file.stem}" in sys.modules


def test_the_files_of_the_tables_tell_the_format(tmp_path: Path, lines: None) -> None:
    write_arrow(tmp_path, "one")
    (tmp_path / "two.txt").write_text("")
    assert isinstance(open_pairs(tmp_path, ["one"]), ArrowPairs)
    assert open_pairs(tmp_path, ["two", "three"], "val") == (tmp_path, ["two", "three"], "val")


def test_a_folder_of_several_formats_is_refused(tmp_path: Path, lines: None) -> None:
    write_arrow(tmp_path)
    (tmp_path / "t.txt").write_text("")
    assert "several formats (arrow, lines), expected one; set data.format" in message_of(tmp_path, ["t"])
    assert isinstance(open_pairs(tmp_path, ["t"], format="arrow"), ArrowPairs)
    assert "several formats" in message_of(tmp_path, ["other"])


def test_a_missing_table_is_named_by_the_only_reader_that_fits(tmp_path: Path, lines: None) -> None:
    write_arrow(tmp_path)
    assert "other.arrow does not exist; the .arrow files there: t.arrow" in message_of(tmp_path, ["other"])


def test_a_folder_without_data_is_refused(tmp_path: Path, lines: None) -> None:
    message = message_of(tmp_path, ["t"])
    assert "no data of a known format, expected " in message and "*.arrow (arrow), " in message
    assert "*.txt (lines); correct data.root or set" in message
    assert "nowhere: no such folder" in message_of(tmp_path / "nowhere", ["t"])


def test_a_name_with_wildcards_is_a_name(tmp_path: Path, lines: None) -> None:
    write_arrow(tmp_path, "[ab]*")
    (tmp_path / "a.txt").write_text("")
    assert isinstance(open_pairs(tmp_path, ["[ab]*"]), ArrowPairs)


@pytest.mark.parametrize("format", ["parquet", "Arrow", ""])
def test_an_unknown_format_is_refused(tmp_path: Path, format: str) -> None:
    message = message_of(tmp_path, ["t"], format=format)
    assert message == f"data.format: got {format!r}, expected one of auto, {', '.join(SOURCES)}, or module:Class"


def test_a_reader_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reader.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    (tmp_path / "t.json").write_text('[{"file": "a.png", "captions": ["red", "a", "red"], "split": "train"}]')
    source = open_pairs(tmp_path, ["t"], "train", format="my_reader:JsonPairs")
    assert (source.num_images, source.num_pairs, source.caption(1), source.image(0).size) == (1, 2, "a", (3, 2))


@pytest.mark.parametrize("format", ["no_such_module:Pairs", "json:NoSuchClass", ":Pairs", "json:"])
def test_a_reader_that_cannot_be_imported(tmp_path: Path, format: str) -> None:
    assert f"data.format: {format!r} cannot be imported" in message_of(tmp_path, ["t"], format=format)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="name: got 'arrow'"):
        register_source("arrow", pattern="*.feather")(ArrowPairs)


def test_captions_are_numbered() -> None:
    texts, pair_image, pair_group = index_captions([["a", "b", "a"], ["b"], ["c", "a"]])
    assert list(texts) == ["a", "b", "b", "c", "a"]
    assert pair_image.tolist() == [0, 0, 1, 2, 2] and pair_group.tolist() == [0, 1, 1, 2, 0]
    assert pair_image.dtype == pair_group.dtype == np.int64
