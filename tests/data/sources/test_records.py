"""JSON, JSON lines, CSV and TSV that name pictures in a folder; what is wrong with them is one line."""

from __future__ import annotations

import json
import pickle
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from caption_files import bomb, picture, write_pictures
from sclkern.data import open_pairs
from sclkern.data.sources.records import RecordPairs
from sclkern.errors import UserError

ROWS = [("one.jpg", "a cat"), ("two.jpg", "a dog"), ("one.jpg", "a tabby")]
FORMS = {
    "objects.json": json.dumps([{"image": image, "caption": caption} for image, caption in ROWS]),
    "lists.json": json.dumps([["one.jpg", ["a cat", "a tabby"]], ["two.jpg", "a dog"]]),
    "several.json": json.dumps([{"file_name": "one.jpg", "captions": ["a cat", "a tabby"]},
                                {"file_name": "two.jpg", "captions": ["a dog"]}]),
    "lines.jsonl": "\n".join(json.dumps({"filepath": image, "text": caption}) for image, caption in ROWS) + "\n\n",
    "coco.json": json.dumps({
        "images": [{"id": 7, "file_name": "one.jpg"}, {"id": 9, "file_name": "two.jpg"}],
        "annotations": [{"id": n, "image_id": 7 if image == "one.jpg" else 9, "caption": caption}
                        for n, (image, caption) in enumerate(ROWS)],
    }),
    "karpathy.json": json.dumps({"dataset": "coco", "images": [
        {"filename": "one.jpg", "cocoid": 7, "sentences": [{"raw": "a cat"}, {"raw": "a tabby"}]},
        {"filename": "two.jpg", "cocoid": 9, "sentences": [{"raw": "a dog"}]},
    ]}),
    "comma.csv": "image,caption\n" + "".join(f"{image},{caption}\n" for image, caption in ROWS),
    "tab.csv": "filepath\ttitle\n" + "".join(f"{image}\t{caption}\n" for image, caption in ROWS),
    "crlf.tsv": "\ufeffImage\tID\tCaption\r\n" + "".join(f"{image}\t0\t {caption} \r\n" for image, caption in ROWS),
    "quoted.csv": 'caption,path\n"a cat","one.jpg"\na dog,two.jpg\n"a tabby",one.jpg',
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCLKERN_CACHE", str(tmp_path / "cache"))


def message_of(root: object, *tables: str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_pairs(root, tables or ("t",), split, format="records")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(root: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path, ["one.jpg", "two.jpg"])
    write(tmp_path, name, FORMS[name])
    source = open_pairs(tmp_path, [name.partition(".")[0]])
    assert isinstance(source, RecordPairs)
    assert (source.num_images, source.num_pairs) == (2, 3)
    assert source.pair_image.tolist() == [0, 0, 1] and source.image_ids.tolist() == [0, 1]
    assert [source.caption(pair) for pair in range(3)] == ["a cat", "a tabby", "a dog"]
    assert [source.image_bytes(image) for image in range(2)] == [picture(0), picture(1)]
    assert source.image(1).size == (32, 24) and source.image_name(1) == f"{name}: two.jpg"
    copy = pickle.loads(pickle.dumps(source))
    assert copy.caption(2) == "a dog" and copy.image_bytes(1) == picture(1)


def test_text_in_quotes_is_kept(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    write(tmp_path, "t.csv", 'image,caption\na.jpg,"a ""big"" cat,\nsitting"\n')
    assert open_pairs(tmp_path, ["t"]).caption(0) == 'a "big" cat,\nsitting'


def test_splits(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    images = [
        {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": f"{name} {n}"} for n in range(2)]}
        for name, split in (("a", "train"), ("b", "restval"), ("c", "test"))
    ]
    write(tmp_path, "dataset_coco.json", {"images": images})
    assert open_pairs(tmp_path, ["dataset_coco"], "train").num_images == 1
    both = open_pairs(tmp_path, ["dataset_coco"], "train+restval")
    assert (both.num_images, both.num_pairs, both.image_name(1)) == (2, 4, "dataset_coco.json: b.jpg (restval)")
    assert "no row of split 'val', expected one of the splits there: restval (1), test (1), train (1)" in message_of(
        tmp_path, "dataset_coco", split="val"
    )
    write(tmp_path, "t.csv", "image,caption\na.jpg,a\n")
    assert "as t.csv names no split; select none (null), or add a column 'split'" in message_of(tmp_path, split="train")


def test_pictures_lie_beside_the_table_or_one_folder_below(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train2014/a.jpg", "val2014/b.jpg", "annotations/c.jpg", "deep/er/d.jpg"])
    names = ["a.jpg", "b.jpg", "c.jpg", "deep/er/d.jpg", str(tmp_path / "val2014" / "b.jpg")]
    write(tmp_path, "annotations/t.json", [[name, f"{n}"] for n, name in enumerate(names)])
    source = open_pairs(tmp_path, ["annotations/t"])
    assert [source.image_name(n).split(": ")[1] for n in range(4)] == [
        "train2014/a.jpg", "val2014/b.jpg", "annotations/c.jpg", "deep/er/d.jpg",
    ]  # fmt: skip
    assert [source.caption(n) for n in (1, 2)] == ["1", "4"]
    write_pictures(tmp_path, ["val2014/a.jpg"])
    write(tmp_path, "annotations/t.json", [["a.jpg", "other"]])
    assert "names a.jpg, which is train2014/a.jpg and val2014/a.jpg, expected one file" in message_of(
        tmp_path, "annotations/t"
    )


def test_tables_behind_a_url(tmp_path: Path) -> None:
    memory, root = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}"
    memory.pipe(f"{root}/images/a.jpg", picture(3))
    memory.pipe(f"{root}/t.csv", b"image,caption\na.jpg,a cat\n")
    source = open_pairs(root, ["t"])
    assert source.caption(0) == "a cat" and source.image(0).size == (32, 24)


def test_the_same_picture_in_two_tables_has_one_id(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    write(tmp_path, "s.csv", "image,caption\na.jpg,a\nb.jpg,b\n")
    write(tmp_path, "t.csv", "image,caption\nb.jpg,c\n")
    assert open_pairs(tmp_path, ["s", "t"]).image_ids.tolist() == [0, 1, 1]  # type: ignore[attr-defined]


def test_a_new_table_is_read_again(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    write(tmp_path, "t.csv", "image,caption\na.jpg,old\n")
    assert open_pairs(tmp_path, ["t"]).caption(0) == "old"
    write(tmp_path, "t.csv", "image,caption\na.jpg,newer\n")
    assert open_pairs(tmp_path, ["t"]).caption(0) == "newer"


REFUSED = {
    "is empty, expected JSON": ("t.json", b" \n"),
    "is packed, expected plain text": ("t.json", b"PK\x03\x04zip bomb"),
    "is in UTF-16, expected UTF-8": ("t.csv", "image,caption\n".encode("utf-16")),
    "is not in UTF-8 (line 2, byte 16)": ("t.csv", b"image,caption\na,\xe9\n"),
    "is no text, it begins with b'\\xff\\xd8": ("t.json", picture()),
    "is an HTML page": ("t.json", b"<!DOCTYPE html><html>"),
    "line 1 is no JSON": ("t.json", b'[{"image": "a.jpg", '),
    "line 2 is no JSON": ("t.jsonl", b'{"image": "a.jpg", "caption": "a"}\n{"image": '),
    "as JSON lines do; name it .jsonl": ("t.json", b'{"image": "a.jpg", "caption": "a"}\n{}'),
    "is nested too deeply": ("t.json", b"[" * 100_000),
    "holds an object with info, licenses, expected a list of": ("t.json", b'{"info": 1, "licenses": 2}'),
    "holds str, expected a list": ("t.json", b'"a"'),
    "record 0 is int, expected an object": ("t.json", b"[1]"),
    "has the columns image, title, caption: title and caption for the caption": (
        "t.csv", b"image,title,caption\na.jpg,b,c\n",
    ),
    "has the columns a.jpg, a cat: none for the picture": ("t.csv", b"a.jpg,a cat\n"),
    "its header has image, caption, image, expected each once": ("t.csv", b"image,caption,image\n"),
    "line 3 is no CSV": ("t.csv", b'image,caption\na.jpg,"a\ncat'),
    "has two images of id 1": (
        "t.json", b'{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
    ),
    "annotation 0 has image_id, bbox, expected image_id and caption": (
        "t.json", b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", REFUSED)
def test_a_table_that_is_not_what_its_name_says(tmp_path: Path, part: str) -> None:
    name, content = REFUSED[part]
    write(tmp_path, name, content)
    message = message_of(tmp_path)
    assert message.startswith(f"{tmp_path}/{name}: ") and part in message
    assert list(tmp_path.iterdir()) == [tmp_path / name]


BROKEN = {
    "its picture lies outside the folder: /etc/passwd": ["/etc/passwd", "a"],
    "leads out of the folder or is not plain: ../a.jpg": ["../a.jpg", "a"],
    "not plain: a\\x00.jpg": ["a\0.jpg", "a"],
    "its picture is a URL, https://x/a.jpg, expected a file": ["https://x/a.jpg", "a"],
    "no such picture: missing.jpg": ["missing.jpg", "a"],
    "it names no picture": [None, "a"],
    "the caption is blank": ["a.jpg", " "],
    "the caption is of type int": ["a.jpg", 7],
    "the caption is of type NoneType": ["a.jpg", None],
    "the caption has null bytes": ["a.jpg", "a\0b"],
    "the caption has half a surrogate pair": ["a.jpg", "\ud800"],
    "it has no caption": ["a.jpg", []],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_record_is_left_out_named_and_counted(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    write(tmp_path, "t.json", [["a.jpg", "a cat"], BROKEN[reason]])
    source = open_pairs(tmp_path, ["t"])
    ((name, why),) = source.defects  # type: ignore[attr-defined]
    assert source.num_pairs == 1 and name == "t.json record 1" and reason in why
    assert "left out 1 of 2 samples: t.json record 1 (" in caplog.text
    write(tmp_path, "t.json", [["a.jpg", "a cat"], *[BROKEN[reason]] * 2])
    assert "2 of 3 samples cannot be used, expected 1 % at most, or one" in message_of(tmp_path)


def test_pictures_that_were_missing_are_found_when_they_are_there(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    write(tmp_path, "t.json", [["a.jpg", "a"], ["b.jpg", "b"], ["c.jpg", "c"]])
    assert "2 of 3 samples cannot be used" in message_of(tmp_path)
    write_pictures(tmp_path, ["b.jpg", "c.jpg"])
    assert open_pairs(tmp_path, ["t"]).num_images == 3


def test_a_picture_that_came_later_is_found_without_a_change_of_the_table(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/a.jpg"])
    write(tmp_path, "t.json", [["a.jpg", "a"], ["b.jpg", "b"]])
    assert open_pairs(tmp_path, ["t"]).num_images == 1
    before = (tmp_path / "t.json.index").stat().st_mtime_ns
    write_pictures(tmp_path, ["train/c.jpg"])
    assert open_pairs(tmp_path, ["t"]).num_images == 1
    assert (tmp_path / "t.json.index").stat().st_mtime_ns == before
    write_pictures(tmp_path, ["new/b.jpg"])
    source = open_pairs(tmp_path, ["t"])
    assert source.num_images == 2 and source.defects == []  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(source)).image_name(1) == "t.json: new/b.jpg"


def test_a_row_with_too_few_or_too_many_columns(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    write(tmp_path, "t.csv", "image,caption\na.jpg,a cat\na.jpg\n")
    assert open_pairs(tmp_path, ["t"]).defects == [  # type: ignore[attr-defined]
        ("t.csv line 3", "it has 1 columns, expected the 2 of the header")
    ]


def test_a_picture_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_pictures(tmp_path, ["secret.jpg", "root/a.jpg"])
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "b.png").write_bytes(bomb())
    write(root, "t.json", [["a.jpg", "a"], ["link.jpg", "b"], ["b.png", "c"]])
    source = open_pairs(root, ["t"])
    with pytest.raises(ValueError, match="a symbolic link leads out of the folder"):
        source.image(1)
    with pytest.raises(ValueError, match="unfolds to 400000000 pixels, expected 89478485 at most; shrink it"):
        source.image(2)
    (root / "outside").symlink_to(tmp_path)
    write(root, "t.json", [["a.jpg", "a"], ["outside/secret.jpg", "b"]])
    assert "outside: a symbolic link leads out of the folder" in message_of(root)
