"""``sclkern data check`` of clips: video files and folders of frames, named by arrow files and by tables."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from clip_files import picture, write_clip
from sclkern.cli import main
from sclkern.data.check import examine

DEFECTS = {
    "videos/empty.mp4": "the file is empty",
    "videos/cut.mp4": "the video cannot be decoded: ",
    "videos/page.mp4": "the video cannot be decoded: ",
    "videos/picture.mp4": "the file is a picture (jpeg_pipe), expected a video",
    "frames/none": "the folder has no frame: no JPEG, PNG, WebP or BMP",
    "frames/sizes": "its frames have several sizes, such as 48 x 48 and 64 x 64, expected one",
    "frames/broken": "the image cannot be decoded: Pillow reads no such file",
}
SOUND = ["videos/a.mp4", "videos/b.mp4", "videos/copy.mp4", "frames/sound"]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("SCLKERN_CACHE", str(tmp_path / "cache"))
    for name in ("videos", "frames/none", "frames/sizes", "frames/broken", "frames/sound"):
        (tmp_path / name).mkdir(parents=True)
    videos = tmp_path / "videos"
    whole = write_clip(videos / "a.mp4", count=6).read_bytes()
    write_clip(videos / "b.mp4", count=3)
    (videos / "copy.mp4").write_bytes(whole)
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "empty.mp4").touch()
    (videos / "page.mp4").write_bytes(b"<!doctype html>" * 40)
    picture(3).save(videos / "picture.mp4", "JPEG")
    for number in range(3):
        picture(number).save(tmp_path / "frames" / "sound" / f"{number}.png")
        picture(number, 64 if number else 48).save(tmp_path / "frames" / "sizes" / f"{number}.png")
    (tmp_path / "frames" / "broken" / "0.jpg").write_bytes(b"x")
    return [*SOUND, *DEFECTS, "videos/missing.mp4"]


def found(report, kind: str) -> dict[str, str]:
    return {one.name: one.reason for one in report.defects if one.kind == kind}


def same_reasons(found: dict[str, str], expected: dict[str, str]) -> bool:
    return found.keys() == expected.keys() and all(found[name].startswith(expected[name]) for name in expected)


def test_clips_of_a_table(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "t.csv").write_text("path,caption\n" + "".join(f"{name},clip {n}\n" for n, name in enumerate(names)))
    report = examine(str(tmp_path / "t.csv"), format="clips", workers=2, samples=2)
    assert (report.format, report.images, report.pairs, report.equal_images) == ("clips", 11, 11, 1)
    assert found(report, "sample left out") == {"t.csv line 13": "no such picture: videos/missing.mp4"}
    expected = {f"t.csv: {name}": reason for name, reason in DEFECTS.items()}
    assert same_reasons(found(report, "picture that cannot be used"), expected) and len(report.defects) == 8
    assert [sample.size for sample in report.samples] == [(64, 64)] * 2
    # Clips that begin with the same frame are no copies, and those of one file in two splits are.
    (tmp_path / "t.csv").write_text("path,caption,split\nvideos/a.mp4,a,train\nvideos/b.mp4,b,val\n")
    assert not examine(str(tmp_path / "t.csv"), format="clips", workers=1).defects
    (tmp_path / "t.csv").write_text("path,caption,split\nvideos/a.mp4,a,train\nvideos/copy.mp4,b,val\n")
    assert len(examine(str(tmp_path / "t.csv"), format="clips", workers=1).defects) == 1
    # Taken for a table of pictures, it says how to read it.
    reason = examine(str(tmp_path / "t.csv"), workers=1).defects[0].reason
    assert "it is a video" in reason and "data.format=clips" in reason


def test_clips_of_an_arrow_file_beside_a_table(tmp_path: Path, names: list[str], capsys) -> None:
    (tmp_path / "t.csv").write_text("path,caption\nvideos/a.mp4,a clip\n")
    columns = {"video": names, "caption": [[f"clip {n}"] for n in range(len(names))], "image_id": names}
    table = pa.table(columns)
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    arguments = ["data", "check", str(tmp_path / "t.arrow"), "--json", str(tmp_path / "report.json")]
    assert main([*arguments, "--workers", "1", "--html", str(tmp_path / "page.html")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["format"], report["images"], report["tables"]) == ("arrow", 12, ["t.arrow"])
    planted = {**DEFECTS, "videos/missing.mp4": f"{tmp_path}/videos/missing.mp4: no such file"}
    expected = {f"t.arrow row {names.index(name)} ({name})": reason for name, reason in planted.items()}
    assert same_reasons({one["name"]: one["reason"] for one in report["defects"]}, expected)
    assert (tmp_path / "page.html").read_text().count("<figure>") == 4
    capsys.readouterr()
