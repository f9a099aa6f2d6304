"""Each converter on a look-alike of its set: rows, bytes, splits and ids compared with what went into the tree."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import look_alikes
from look_alikes import Tree
from look_alikes.tree import write
from sclkern.cli import main
from sclkern.cli.parser import SETS as NAMES
from sclkern.data import open_pairs
from sclkern.data.convert import SETS, Options, convert
from sclkern.data.convert.card import card_text
from sclkern.data.images import decode_image
from sclkern.data.source import has_clips
from sclkern.data.sources.arrow import ArrowPairs
from sclkern.errors import UserError

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all().to_pylist()


def make(name: str, root: Path, **options: Any) -> Tree:
    return getattr(look_alikes, name.replace("-", "_"))(root, **options)


def converted(tree: Tree, name: str, output: Path, **options: Any) -> tuple[dict[str, Rows], dict[str, Any]]:
    card = convert(name, tree.root, output, Options(**options), workers=2, part_rows=4)
    assert sorted(card["tables"]) == sorted(path.stem for path in output.glob("*.arrow"))
    assert json.loads((output / f"{name}.card.json").read_text()) == card and card["complete"]
    assert (output / f"{name}.card.txt").read_text() == card_text(card)
    return {table: read(output / f"{table}.arrow") for table in card["tables"]}, card


def compare(tree: Tree, tables: dict[str, Rows], files: dict[str, str], keys: tuple[str, ...]) -> None:
    """Every expected row is there in order, with the bytes of its files and the values of ``keys``."""
    assert {name: len(rows) for name, rows in tables.items()} == {name: len(rows) for name, rows in tree.rows.items()}
    for name, rows in tables.items():
        for row, expected in zip(rows, tree.rows[name], strict=True):
            for column, key in files.items():
                content = expected.get("content") or (tree.root / expected[key]).read_bytes()
                assert row[column] == content, (name, expected)
            for key in keys:
                assert row[key] == expected[key], (name, expected)


PAIRS = {
    "coco": ("truncated", "missing", "sixth", "cmyk", "grey", "blank", "twice"),
    "flickr30k": ("truncated", "missing", "extra"),
    "sbu": ("empty", "missing", "other_name", "extra"),
    "cc3m": ("empty", "missing", "other_name", "extra"),
    "cc12m": ("empty", "failed", "parquet", "twice"),
}


def test_the_command_knows_every_set():
    assert tuple(SETS) == NAMES


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("broken", [False, True])
def test_pairs(name, broken, tmp_path):
    tree = make(name, tmp_path / "in", defects=PAIRS[name] if broken else ())
    tables, card = converted(tree, name, tmp_path / "out")
    compare(tree, tables, {"image": "file"}, ("caption", "image_id", "split"))
    assert [*next(iter(tables.values()))[0]] == ["image", "caption", "image_id", "split"]
    source = ArrowPairs(tmp_path / "out", list(tables))
    assert source.num_images == sum(map(len, tables.values()))
    assert all(source.image(image).size == (80, 64) for image in range(source.num_images))
    if not broken:
        assert card["missing"]["count"] == card["dropped"]["count"] == card["undecodable"]["count"] == 0


def test_the_card_names_every_defect_of_coco(tmp_path):
    tree = make("coco", tmp_path / "in", defects=PAIRS["coco"])
    _, card = converted(tree, "coco", tmp_path / "out")
    assert card["undecodable"]["count"] == 1
    assert "truncated" in card["undecodable"]["files"][tree.defective["truncated"]]
    assert card["missing"]["reasons"] == {"pictures of train2014/": {"count": 1, "names": [tree.defective["missing"]]}}
    assert card["dropped"]["reasons"] == {
        "captions without text": {"count": 1, "names": [tree.defective["blank"]]},
        "records of a picture that an earlier one names": {"count": 1, "names": [tree.defective["twice"]]},
    }
    assert card["found"]["pictures with more than five captions"] == 1
    text = (tmp_path / "out" / "coco.card.txt").read_text()
    assert all(tree.defective[name] in text for name in ("truncated", "missing", "blank", "twice"))


def test_the_card_names_every_defect_of_web_sets(tmp_path):
    tree = make("sbu", tmp_path / "in", defects=PAIRS["sbu"])
    _, card = converted(tree, "sbu", tmp_path / "out")
    assert card["undecodable"]["files"] == {tree.defective["empty"]: "it is empty"}
    assert card["missing"]["reasons"]["pictures of images_train/"]["names"] == ["0003/107.jpg", "0003/other_111.jpg"]
    assert card["found"]["files of images_train/ that no caption goes with"] == 2
    tree = make("cc12m", tmp_path / "tars", defects=PAIRS["cc12m"])
    _, card = converted(tree, "cc12m", tmp_path / "out2")
    reasons = card["missing"]["reasons"]
    assert reasons["status failed_to_resize"]["count"] == 2
    assert tree.defective["failed"] in reasons["status failed_to_download"]["names"]
    assert card["undecodable"]["files"] == {tree.defective["empty"]: "it is empty"}
    assert card["dropped"]["reasons"]["samples with the key of an earlier one"]["names"] == [tree.defective["twice"]]


def test_a_truncated_tar_is_an_error(tmp_path):
    tree = make("cc12m", tmp_path / "in", defects=("truncated",))
    with pytest.raises(UserError, match=rf"{tree.defective['truncated']}: is no whole tar .* download it again"):
        convert("cc12m", tree.root, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.arrow"))


def test_swapped_splits_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("sclkern.data.convert.karpathy._FLICKR_SIZES", {"train": 24, "val": 6, "test": 8})
    _, card = converted(make("flickr30k", tmp_path / "in"), "flickr30k", tmp_path / "out")
    assert card["notes"] == []
    tree = make("flickr30k", tmp_path / "swapped", defects=("swapped",))
    _, card = converted(tree, "flickr30k", tmp_path / "out2")
    assert "the sizes of val and test are those of each other: the splits seem to be swapped" in card["notes"]


def test_regions_of_visual_genome(tmp_path):
    tree = make("vg", tmp_path / "in", defects=("blank", "truncated", "missing", "cmyk"))
    tables, card = converted(tree, "vg", tmp_path / "out")
    compare(tree, tables, {"image": "file"}, ("caption", "width", "height", "x", "y", "image_id"))
    assert [*tables["vg"][0]] == ["image", "caption", "width", "height", "x", "y", "image_id"]
    assert card["dropped"]["reasons"]["captions without text"]["names"] == [tree.defective["blank"]]


def test_a_missing_folder_of_visual_genome(tmp_path):
    tree = make("vg", tmp_path / "in", defects=("no_second_folder",))
    message = r"20 of 40 files are missing: 20 pictures; the folder VG_100K_2/ is missing .*--allow-missing"
    with pytest.raises(UserError, match=message):
        convert("vg", tree.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tables, card = converted(tree, "vg", tmp_path / "out", allow_missing=True)
    compare(tree, tables, {"image": "file"}, ("image_id",))
    assert card["missing"]["count"] == 20


def test_pictures_of_test_sets_are_left_out(tmp_path):
    tree = make("vg", tmp_path / "in")
    coco, flickr = make("coco", tmp_path / "coco"), make("flickr30k", tmp_path / "flickr")
    files = (
        f"coco={coco.root / 'karpathy/dataset_coco.json'}",
        f"flickr30k={flickr.root / 'dataset_flickr30k.json'}",
    )
    tables, card = converted(tree, "vg", tmp_path / "out", without_tests_of=files)
    # Of coco's test pictures, from 38, only those of numbers 4 n have a coco_id; of flickr30k's, from 30, 4 n + 1.
    assert {row["image_id"] for row in tables["vg"]} == set(map(str, range(40))) - {"33", "37"}
    assert card["dropped"]["reasons"]["pictures of the test set of flickr30k"]["count"] == 2
    assert card["found"]["pictures that are also in COCO"] == 10
    with pytest.raises(UserError, match=r"has no splits of coco .*expected karpathy/dataset_coco.json"):
        convert("vg", tree.root, tmp_path / "other", Options(without_tests_of=("coco",)))


def test_questions(tmp_path):
    defects = ("unanswered", "missing", "without_annotation")
    tree = make("vqav2", tmp_path / "in", defects=defects)
    tables, card = converted(tree, "vqav2", tmp_path / "out", rest_val=3, seed=5)
    drawn = {name: tables.pop(f"vqav2_{name}") for name in ("trainable_val", "rest_val")}
    compare(tree, tables, {"image": "file"}, ("questions", "question_id", "image_id"))
    columns = ["image", "questions", "answers", "answer_labels", "answer_scores", "image_id", "question_id", "split"]
    assert [*tables["vqav2_train"][0]] == columns
    answers = json.loads((tmp_path / "out" / "vqav2_answers.json").read_text())
    assert answers == ["yes", "2", "t shirt", "no"]
    assert tables["vqav2_train"][0]["answer_labels"] == [[0], [1], [2], [3]]
    assert tables["vqav2_train"][0]["answers"] == [["yes"], ["2"], ["t shirt"], ["no"]]
    assert tables["vqav2_test"][0]["answers"] == []
    ids = {name: sorted(row["image_id"] for row in rows) for name, rows in drawn.items()}
    assert len(ids["rest_val"]) == 3
    assert sorted(ids["trainable_val"] + ids["rest_val"]) == [row["image_id"] for row in tables["vqav2_val"]]
    assert "rest_val: 3 pictures of validation, drawn with seed 5" in card["notes"]
    reasons = card["dropped"]["reasons"]
    assert reasons["questions of train without a kept answer"]["names"] == [tree.defective["unanswered"]]
    assert reasons["questions of val without annotation"]["names"] == [tree.defective["without_annotation"]]
    published, _ = converted(tree, "vqav2", tmp_path / "out2", rest_val=3, answers="published")
    # The raw texts "two" and "the t-shirt" are no classes.
    assert published["vqav2_train"][0]["answers"] == [["yes"], ["no"]]


def test_pairs_of_pictures(tmp_path):
    tree = make("nlvr2", tmp_path / "in", defects=("not_png", "missing", "truncated"))
    tables, card = converted(tree, "nlvr2", tmp_path / "out")
    for name, rows in tables.items():
        expected = tree.rows[name]
        assert [row["identifier"] for row in rows] == [row["identifier"] for row in expected]
        for row, of_tree in zip(rows, expected, strict=True):
            assert (row["questions"], row["answers"]) == (of_tree["questions"], of_tree["answers"])
            contents = [(tree.root / file).read_bytes() for file in of_tree["files"]]
            assert [row["image_0"], row["image_1"]] == contents
            assert all(decode_image(content).size == (80, 64) for content in contents)
    assert sorted(tables) == sorted(tree.rows)
    assert [*card["undecodable"]["files"]] == [tree.defective["truncated"]] and card["undecodable"]["count"] == 1
    assert card["missing"]["reasons"]["pairs of train that lack a picture"]["names"] == [tree.defective["missing"]]


@pytest.mark.parametrize(
    ("name", "options", "defects"),
    [
        ("msrvtt", {}, ("missing", "nineteen", "truncated")),
        ("msrvtt", {"clip4clip": True}, ("missing", "nineteen", "truncated")),
        ("lsmdc", {}, ("missing", "twice")),
        ("lsmdc", {"frame_folders": True}, ("someone",)),
        ("webvid", {}, ("missing", "truncated")),
        ("webvid", {"headless": True}, ("missing", "truncated")),
    ],
)
def test_clips(name, options, defects, tmp_path):
    tree = make(name, tmp_path / "in", defects=defects, **options)
    tables, card = converted(tree, name, tmp_path / "out")
    assert sorted(tables) == sorted(tree.rows)
    for table, rows in tables.items():
        for row, expected in zip(rows, tree.rows[table], strict=True):
            assert row["video"] == expected["video"] and row["image_id"] == expected["image_id"]
            assert sorted(row["caption"]) == sorted(expected["caption"]) and row["split"] == expected["split"]
    lost = {defect for defect in defects if defect in ("missing", "truncated")}
    assert card["missing"]["count"] == ("missing" in lost)
    assert [*card["undecodable"]["files"]] == [tree.defective[one] for one in lost & {"truncated"}]


def test_frames_of_clips(tmp_path):
    tree = make("msrvtt", tmp_path / "in")
    tables, _ = converted(tree, "msrvtt", tmp_path / "out", frames=3, resize=24)
    row = tables["msrvtt_train"][0]
    assert [*row] == ["frames", "caption", "image_id", "split"]
    frames = [Image.open(io.BytesIO(frame)) for frame in row["frames"]]
    assert [(frame.format, frame.size) for frame in frames] == [("JPEG", (32, 24))] * 3
    first, _, last = (np.asarray(frame, dtype=float) for frame in frames)
    assert np.abs(first - last).mean() > 2  # it moves


def test_regions_of_words(tmp_path):
    tree = make("align-bench", tmp_path / "in")
    tables, _ = converted(tree, "align-bench", tmp_path / "out")
    compare(tree, tables, {"image": "file"}, ("caption", "image_id"))
    for row, expected in zip(tables["align_bench"], tree.rows["align_bench"], strict=True):
        assert row["words"] == [*expected["regions"]]
        for boxes, masks, regions in zip(row["boxes"], row["masks"], expected["regions"].values(), strict=True):
            assert boxes == [region["bbox_mask"] for region in regions]
            for mask, region in zip(masks, regions, strict=True):
                assert (np.asarray(Image.open(io.BytesIO(mask))) == region["pixel_mask"]).all()


def test_shrinking(tmp_path):
    tree = make("coco", tmp_path / "in", defects=("cmyk", "grey"))
    tables, _ = converted(tree, "coco", tmp_path / "out", resize=48)
    for rows in tables.values():
        for row in rows:
            picture = Image.open(io.BytesIO(row["image"]))
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (60, 48))
    # Not enlarged, and then not touched.
    tables, _ = converted(tree, "coco", tmp_path / "out2", resize=64)
    compare(tree, tables, {"image": "file"}, ())


def test_too_many_undecodable(tmp_path):
    tree = make("coco", tmp_path / "in")
    for name in sorted((tree.root / "train2014").iterdir())[:2]:
        name.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"2 of 46 files cannot be decoded, .* \(it is an HTML page\)"):
        convert("coco", tree.root, tmp_path / "out", workers=1)
    card = json.loads((tmp_path / "out" / "coco.card.json").read_text())
    assert not card["complete"] and not list((tmp_path / "out").glob("*.arrow"))
    # Repaired, the conversion goes on.
    make("coco", tmp_path / "in")
    tables, _ = converted(tree, "coco", tmp_path / "out")
    compare(tree, tables, {"image": "file"}, ("caption",))


def test_a_picture_out_of_the_source_is_named_and_counted_as_missing(tmp_path):
    tree = make("coco", tmp_path / "in")
    path = tree.root / "karpathy" / "dataset_coco.json"
    content = json.loads(path.read_text())
    name = content["images"][3]["filename"]
    write(tmp_path / "elsewhere" / name, b"")
    content["images"][3]["filepath"] = "../elsewhere"
    write(path, content)
    _, card = converted(tree, "coco", tmp_path / "out")
    missing = card["missing"]
    assert missing["count"] == 1 and f"../elsewhere/{name}" in json.dumps(missing["reasons"])


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    tree = make("msrvtt", tmp_path / "in")
    path = tree.root / "high-quality" / "structured-symlinks" / "jsfusion_val_caption_idx.pkl"
    path.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(UserError, match=r"caption_idx.pkl: cannot be read \(it calls (os|posix).system\)"):
        convert("msrvtt", tree.root, tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[]", '{"images": [{"filename": 1}]}', "<html>"])
def test_a_wrong_annotation_file_is_named(content, tmp_path):
    tree = make("coco", tmp_path / "in")
    write(tree.root / "karpathy" / "dataset_coco.json", content)
    with pytest.raises(UserError, match=r"dataset_coco\.json: .*(download it again|of this name|right file)"):
        convert("coco", tree.root, tmp_path / "out")


def test_files_of_others_are_kept(tmp_path):
    tree = make("coco", tmp_path / "in")
    other = write(tmp_path / "out" / "coco_caption_karpathy_val.arrow", b"of someone else")
    with pytest.raises(UserError, match=r"that no conversion of coco has written"):
        convert("coco", tree.root, tmp_path / "out")
    assert other.read_bytes() == b"of someone else"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vg", "{}", "--frames", "3"], "--frames: got 3 for the set vg, where it has no effect there"),
        (["align-bench", "{}", "--resize", "3"], "its boxes and masks are in pixels"),
        (["coco", "{}", "--resize", "0"], "--resize: got 0, expected at least 1"),
        (["coco", "{}/nothing"], "nothing is no folder"),
        (["coco", "{}"], "has no Karpathy's splits, expected karpathy/dataset_coco.json"),
    ],
)
def test_errors_of_the_command(arguments, message, tmp_path, capsys):
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert main(["data", "convert", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_the_card(tmp_path, capsys):
    tree = make("sbu", tmp_path / "in", defects=("missing",))
    assert main(["data", "convert", "sbu", str(tree.root), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "sbu.card.txt").read_text()


@pytest.mark.parametrize("frames", [None, 3])
def test_converted_clips_are_read(tmp_path, frames):
    """The clips that the tables name, below the folder of the set, or the frames that they hold."""
    root = look_alikes.msrvtt(tmp_path / "set").root
    output = root if frames is None else tmp_path / "arrow"
    convert("msrvtt", root, output, Options(frames=frames), workers=1)
    source = open_pairs(output, ["msrvtt_train"])
    assert has_clips(source) and source.num_images > 1
    counts = []
    for clip in range(source.num_images):
        (frame,) = source.frames(clip, lambda count: counts.append(count) or [count - 1])
        assert frame.mode == "RGB"
    assert min(counts) >= 1 and (frames is None or set(counts) == {frames})


def test_a_path_out_of_the_source_is_named_and_left_out(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    make("coco", tmp_path / "source")
    splits = tmp_path / "source" / "karpathy" / "dataset_coco.json"
    content = json.loads(splits.read_text())
    for image, folder in zip(content["images"], ("..", "/etc"), strict=False):
        image |= {"filepath": folder, "filename": "secret.jpg"}
        splits.write_text(json.dumps(content))
        arguments = [
            "data",
            "convert",
            "coco",
            str(tmp_path / "source"),
            "--output",
            str(tmp_path / folder.strip("/.")),
        ]
        # One of them is named, two are too many.
        assert main(arguments) == (0 if folder == ".." else 2)
    card = json.loads((tmp_path / "coco.card.json").read_text())
    assert "../secret.jpg" in str(card["missing"])
