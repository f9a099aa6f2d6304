"""Sources of clips: arrow files of names or of frames, and tables."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from clip_files import picture, write_clip
from sclkern.data import open_pairs
from sclkern.data.source import has_clips
from sclkern.errors import UserError


def write_arrow(path, column, values, kind):
    count = len(values)
    columns = {
        column: pa.array(values, kind),
        "caption": pa.array([[f"clip {n}", "a clip"] for n in range(count)], pa.list_(pa.string())),
        "image_id": pa.array([f"id{n}" for n in range(count)], pa.string()),
        "split": pa.array(["train"] * count, pa.string()),
    }
    table = pa.table(columns)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def encoded(number):
    content = io.BytesIO()
    picture(number).save(content, "PNG")
    return content.getvalue()


def test_arrow_files_name_clips(tmp_path):
    (tmp_path / "videos").mkdir()
    for number in range(3):
        write_clip(tmp_path / "videos" / f"{number}.mp4", count=8 + number)
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(5):
        picture(number).save(frames / f"frames_{number:06}.png")
    names = [f"videos/{number}.mp4" for number in range(3)] + ["frames/", "videos/gone.mp4", None]
    write_arrow(tmp_path / "clips.arrow", "video", names, pa.string())
    # One clip of a hundred may have no name.
    source = open_pairs(tmp_path, ["clips"], "train")
    assert has_clips(source) and source.num_images == 6 and source.num_pairs == 12
    for clip, expected in enumerate((8, 9, 10, 5)):
        counts = []
        found = source.frames(clip, lambda count, counts=counts: counts.append(count) or [0, count - 1])
        assert counts == [expected] and [frame.mode for frame in found] == ["RGB", "RGB"]
    np.testing.assert_array_equal(np.asarray(source.image(3)), np.asarray(picture(2)))
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(np.asarray(copy.image(1)), np.asarray(source.image(1)))
    assert copy.caption(3) == "a clip" and copy.image_name(2) == "clips.arrow row 2 (id2)"
    with pytest.raises(ValueError, match=r"gone\.mp4: no such file"):
        source.frames(4, lambda count: [0])
    with pytest.raises(ValueError, match="null"):
        source.frames(5, lambda count: [0])


def test_arrow_files_hold_frames(tmp_path):
    values = [[encoded(number) for number in range(4)], []]
    write_arrow(tmp_path / "clips.arrow", "frames", values, pa.list_(pa.binary()))
    source = open_pairs(tmp_path, ["clips"])
    counts = []
    found = source.frames(0, lambda count: counts.append(count) or [1, 3, 3])
    assert counts == [4]
    for frame, number in zip(found, (1, 3, 3), strict=True):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(picture(number)))
    with pytest.raises(ValueError, match="the clip has no frame"):
        source.image(1)


def test_arrow_files_of_images_stay_images(tmp_path):
    write_arrow(tmp_path / "images.arrow", "image", [encoded(1)], pa.binary())
    assert not has_clips(open_pairs(tmp_path, ["images"]))
    write_arrow(tmp_path / "other.arrow", "picture", [encoded(1)], pa.binary())
    with pytest.raises(UserError, match="column 'image' is missing, expected binary"):
        open_pairs(tmp_path, ["other"])


def test_tables_name_clips(tmp_path):
    write_clip(tmp_path / "a.mp4", count=6)
    folder = tmp_path / "b"
    folder.mkdir()
    picture(7).save(folder / "b_000000.png")
    lines = [{"video": "a.mp4", "caption": "first"}, {"video": "b", "caption": "second"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_pairs(tmp_path, ["list"], format="clips")
    assert has_clips(source) and source.num_images == 2
    assert len(source.frames(0, range)) == 6
    np.testing.assert_array_equal(np.asarray(source.image(1)), np.asarray(picture(7)))
    assert source.image_name(1) == "list.jsonl: b"
    # The index of clips is none of pictures, for which a folder is no picture.
    with pytest.raises(UserError, match="no such picture: b"):
        lines = lines[1:]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, [*lines, *lines])))
        open_pairs(tmp_path, ["list"], format="records")


def test_a_clip_outside_of_the_folder_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    write_clip(tmp_path / "outside.mp4", count=2)
    write_arrow(root / "clips.arrow", "video", ["../outside.mp4"], pa.string())
    source = open_pairs(root, ["clips"])
    with pytest.raises(UserError, match="leads out of the folder"):
        source.frames(0, lambda count: [0])
