from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sclkern.data import demo_root, open_pairs, resolve_root
from sclkern.data.source import has_clips
from sclkern.data.sources.arrow import ArrowPairs, write_pairs
from sclkern.errors import UserError

Row = dict[str, Any]


def row(caption: Any = ("a cat",), image: bytes | None = b"image", split: str = "train", name: str = "x") -> Row:
    return {
        "image": image,
        "caption": None if caption is None else list(caption),
        "image_id": name,
        "split": split,
    }


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def write_columns(path: Path, schema: pa.Schema, *batches: list[Row]) -> None:
    with pa.ipc.new_file(path, schema) as writer:
        for rows in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def error_of(root: Path, *tables: str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        ArrowPairs(root, tables or ("t",), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


captions = st.lists(st.sampled_from(["a", "b", " b", "é", "🤖", "a long caption"]), min_size=1, max_size=5)
rows = st.builds(row, captions, st.binary(max_size=4), st.sampled_from(["train", "val"]), st.text("xyz", max_size=3))
files = st.lists(st.tuples(st.lists(rows, min_size=1, max_size=12), st.integers(1, 5)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(files, st.sampled_from([None, "train", "val"]))
def test_agrees_with_plain_python(tmp_path_factory: pytest.TempPathFactory, files: Any, split: str | None) -> None:
    root = tmp_path_factory.mktemp("tables")
    expected: list[tuple[str, bytes, list[str]]] = []
    for number, (content, batch_rows) in enumerate(files):
        write_pairs(root / f"t{number}.arrow", content, batch_rows=batch_rows)
        for index, entry in enumerate(content):
            if split in (None, entry["split"]):
                name = f"t{number}.arrow row {index} ({entry['image_id']})"
                expected.append((name, entry["image"], list(dict.fromkeys(entry["caption"]))))
    tables = [f"t{number}" for number in range(len(files))]
    if not expected:
        error_of(root, *tables, split=split)
        return

    table = ArrowPairs(root, tables, split)
    texts = [text for _, _, unique in expected for text in unique]
    assert table.num_images == len(expected)
    assert table.num_pairs == len(texts)
    assert [table.image_name(image) for image in range(table.num_images)] == [name for name, _, _ in expected]
    assert [bytes(table.image_bytes(image)) for image in range(table.num_images)] == [data for _, data, _ in expected]
    assert [table.caption(pair) for pair in range(table.num_pairs)] == texts
    assert table.pair_image.tolist() == [i for i, (_, _, unique) in enumerate(expected) for _ in unique]
    groups = table.pair_group.tolist()
    assert len(set(groups)) == len(set(texts)) == len(set(zip(groups, texts, strict=True)))


def test_large_types_integer_ids_empty_batches_and_null_lists_elsewhere(tmp_path: Path) -> None:
    fields = {"image": pa.large_binary(), "caption": pa.large_list(pa.large_string()), "image_id": pa.int64()}
    content = [
        {"image": b"1", "caption": ["a", "b"], "image_id": 7},
        {"image": b"2", "caption": ["b"], "image_id": 8},
    ]
    write_columns(tmp_path / "t.arrow", pa.schema(fields), [], content[:1], [], content[1:], [])
    table = ArrowPairs(tmp_path, ["t"])
    assert [table.caption(pair) for pair in range(3)] == ["a", "b", "b"]
    assert table.pair_group[1] == table.pair_group[2] != table.pair_group[0]
    assert table.image_name(1) == "t.arrow row 1 (8)"
    assert bytes(table.image_bytes(1)) == b"2"


def test_faults_of_other_splits_do_not_matter(tmp_path: Path) -> None:
    faulty = [row(None, split="val"), row([" "], split="val"), row(image=None, split="val")]
    write_pairs(tmp_path / "t.arrow", [*faulty, row(["a", "b"]), row(["b"])])
    table = ArrowPairs(tmp_path, ["t"], "train")
    assert [table.caption(pair) for pair in range(3)] == ["a", "b", "b"]
    assert table.image_name(0) == "t.arrow row 3 (x)"


def test_without_optional_columns(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.arrow", [{"image": b"1", "caption": ["a"]}])
    assert ArrowPairs(tmp_path, ["t"]).image_name(0) == "t.arrow row 0"
    message = error_of(tmp_path, split="train")
    assert "t.arrow: column 'split' is missing, expected string" in message


def test_images_are_not_copied(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.arrow", [row(image=bytes(1 << 20)) for _ in range(8)], batch_rows=3)
    before = pa.total_allocated_bytes()
    table = ArrowPairs(tmp_path, ["t"])
    views = [table.image_bytes(image) for image in range(8)]
    assert sum(map(len, views)) == 8 << 20
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_pickles_without_the_data(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.arrow", [row([f"caption {i}"], bytes([i]) * 10_000) for i in range(20)], batch_rows=3)
    table = ArrowPairs(tmp_path, ["t"])
    data = pickle.dumps(table)
    assert len(data) < 10_000
    copy = pickle.loads(data)
    assert [copy.caption(pair) for pair in range(20)] == [table.caption(pair) for pair in range(20)]
    assert all(copy.image_bytes(image) == table.image_bytes(image) for image in range(20))


def test_holds_arrays_only(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.arrow", [row()])
    state = ArrowPairs(tmp_path, ["t"]).__getstate__()
    per_pair = [value for value in state.values() if isinstance(value, np.ndarray)]
    assert len(per_pair) == 5
    assert all(array.dtype in (np.int32, np.int64) for array in per_pair)


def test_missing_file_lists_those_there(tmp_path: Path) -> None:
    write_pairs(tmp_path / "vg.arrow", [row()])
    message = error_of(tmp_path, "coco")
    assert "coco.arrow does not exist" in message and message.endswith("there: vg.arrow")
    assert error_of(tmp_path / "nowhere").endswith("there: none")


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no table is named"):
        ArrowPairs(tmp_path, [])


@pytest.mark.parametrize("length", [0, 3, 1000, -1])
def test_cut_short_file(tmp_path: Path, length: int) -> None:
    write_pairs(tmp_path / "t.arrow", [row(image=bytes(5000))])
    whole = (tmp_path / "t.arrow").read_bytes()
    (tmp_path / "t.arrow").write_bytes(whole[:length])
    assert "t.arrow: cannot be read" in error_of(tmp_path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.arrow", [row(["a caption to spoil"])])
    whole = (tmp_path / "t.arrow").read_bytes()
    (tmp_path / "t.arrow").write_bytes(whole.replace(b"caption to spoil", b"caption to spoi\xff"))
    assert "t.arrow: cannot be read" in error_of(tmp_path)


def test_stream_format(tmp_path: Path) -> None:
    schema = pa.schema({"image": pa.binary(), "caption": pa.list_(pa.string())})
    with pa.ipc.new_stream(tmp_path / "t.arrow", schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([{"image": b"1", "caption": ["a"]}], schema=schema))
    assert "no stream" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("image", None, "column 'image' is missing, expected binary"),
        ("caption", None, "column 'caption' is missing, expected list<"),
        ("image", pa.string(), "column 'image' is of type string, expected binary"),
        ("caption", pa.string(), "column 'caption' is of type string, expected list<"),
        ("caption", pa.list_(pa.int32()), "column 'caption' is of type list<"),
        ("split", pa.int32(), "column 'split' is of type int32, expected string"),
    ],
)
def test_wrong_columns(tmp_path: Path, name: str, kind: pa.DataType | None, problem: str) -> None:
    fields = {"image": pa.binary(), "caption": pa.list_(pa.string()), "split": pa.string()}
    fields.pop(name) if kind is None else fields.update({name: kind})
    write_columns(tmp_path / "t.arrow", pa.schema(fields), [dict.fromkeys(fields)])
    message = error_of(tmp_path, split="train")
    assert message.startswith("t.arrow: ") and problem in message


def test_empty_split_lists_the_splits(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.arrow", [row(), row(split="val")], batch_rows=1)
    write_pairs(tmp_path / "b.arrow", [row()])
    message = error_of(tmp_path, "a", "b", split="test")
    assert "a.arrow, b.arrow: no row of split 'test'" in message and message.endswith("train (2), val (1)")


def test_names_of_splits_are_shown_on_a_line(tmp_path: Path) -> None:
    write_pairs(tmp_path / "t.arrow", [row(split="a\nb\0"), *(row(split=f"s{i:03}" + "x" * 999) for i in range(300))])
    message = error_of(tmp_path, split="test")
    assert r"a b\x00 (1), s000x" in message and message.endswith("… (1), ...") and len(message) < 2000


def test_no_rows(tmp_path: Path) -> None:
    write_columns(tmp_path / "t.arrow", pa.schema({"image": pa.binary(), "caption": pa.list_(pa.string())}))
    assert "t.arrow: no row," in error_of(tmp_path)
    write_columns(tmp_path / "t.arrow", pa.schema({"image": pa.binary(), "caption": pa.list_(pa.string())}), [])
    assert "t.arrow: no row," in error_of(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(["fine", None]), "t.arrow row 4: caption 1 is null or blank"),
        (row(["", "fine"]), "t.arrow row 4: caption 0 is null or blank"),
        (row(["fine", "fine", " \t\n\u3000"]), "t.arrow row 4: caption 2 is null or blank"),
        (row([]), "t.arrow row 4: has no caption"),
        (row(None), "t.arrow row 4: has no caption"),
    ],
)
@pytest.mark.parametrize("batch_rows", [2, 3, 100])
def test_faulty_rows_are_named(tmp_path: Path, bad: Row, message: str, batch_rows: int) -> None:
    write_pairs(tmp_path / "first.arrow", [row()] * 3)
    write_pairs(tmp_path / "t.arrow", [*[row()] * 4, bad, row()], batch_rows=batch_rows)
    assert error_of(tmp_path, "first", "t").startswith(message)


@pytest.mark.parametrize(("total", "without"), [(3, 1), (250, 2)])
def test_a_few_rows_without_an_image_are_undecodable(tmp_path: Path, total: int, without: int) -> None:
    content = [row(image=None)] * without + [row()] * (total - without)
    write_pairs(tmp_path / "t.arrow", content, batch_rows=2)
    table = ArrowPairs(tmp_path, ["t"])
    assert table.num_images == total and bytes(table.image_bytes(without)) == b"image"
    with pytest.raises(ValueError, match=r"no image \(null\)"):
        table.image(without - 1)
    write_pairs(tmp_path / "t.arrow", [row(split="val", image=None), row(image=None), *content], batch_rows=2)
    message = error_of(tmp_path, split="train")
    assert message.startswith(f"t.arrow row 1: has no image (null), as {without + 1} of {total + 1} rows")


def test_write_of_clips(tmp_path: Path) -> None:
    frames = [encoded(shade) for shade in (0, 128, 255)]
    write_pairs(tmp_path / "t.arrow", [{"frames": frames, "caption": ["a dawn"]}] * 2)
    clips = open_pairs(tmp_path, ["t"])
    assert has_clips(clips) and clips.num_images == 2 and clips.caption(0) == "a dawn"
    assert [frame.getpixel((0, 0))[0] for frame in clips.frames(1, range)] == [0, 128, 255]


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    write_pairs(path, [row(["old"])])

    def fails() -> Any:
        yield from [row(["new"])] * 5
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(path, fails(), batch_rows=2)
    assert [file.name for file in tmp_path.iterdir()] == ["t.arrow"]
    assert ArrowPairs(tmp_path, ["t"]).caption(0) == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no row to write"),
        ([{"frames": "a.png", "caption": ["a"]}], "expected a list of the bytes of image files"),
        ([{"frames": b"png", "caption": ["a"]}], "do not fit"),
        ([{"frames": [b"png"], "image": b"png", "caption": ["a"]}], "expected image or frames"),
        ([{"caption": ["a"]}], "row 0 has the keys"),
        ([{**row(), "width": 3}], "row 0 has the keys"),
        ([row(), {"image": b"1", "caption": ["a"]}], "row 1 has the keys"),
        ([row(), {**row(), "caption": "a cat"}], "row 1: caption is the str 'a cat', expected a list"),
        ([row(), {**row(), "image": "cat.jpg"}], "row 1: image is the str 'cat.jpg', expected the bytes"),
        ([row(), {**row(), "caption": [1]}], "rows 0 to 1 do not fit"),
        ([row(), {**row(), "image_id": 3}], "rows 0 to 1 do not fit"),
    ],
)
def test_write_refuses(tmp_path: Path, content: list[Row], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        write_pairs(tmp_path / "t.arrow", content)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_demo() -> None:
    digest = hashlib.sha256((demo_root() / "pairs.arrow").read_bytes()).hexdigest()
    assert digest == "a406314aeb8ea54bc276d015a38618378fbb7fb09b707e025662fbe3b011df94"
    assert open_pairs("demo", ["pairs"]).num_images == 1258
    sizes = {split: open_pairs("demo", ["pairs"], split).num_images for split in ("train", "val", "test")}
    assert sizes == {"train": 1015, "val": 124, "test": 119}
    assert resolve_root("./demo") != demo_root() == resolve_root("demo")
