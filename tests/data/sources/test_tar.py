"""Tars of WebDataset's naming: read at any place through an index that is checked; broken ones are one line."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import tarfile
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caption_files import bomb, picture, sample, write_samples, write_tar
from sclkern.cli import main
from sclkern.data import open_pairs
from sclkern.data.digest import digest
from sclkern.data.sources.arrow import ArrowPairs, write_pairs
from sclkern.data.sources.tar import TarPairs
from sclkern.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCLKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def message_of(root: object, *tables: str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_pairs(root, tables or ("t",), split, format="tar")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_and_captions_are_those_of_the_files(tmp_path: Path) -> None:
    for shard in range(3):
        write_samples(tmp_path / f"shards/{shard:05}.tar", 4, first=4 * shard)
    source = open_pairs(tmp_path, ["shards/{00000..00002}"])
    assert isinstance(source, TarPairs)
    assert (source.num_images, source.num_pairs) == (12, 12)
    assert source.pair_image.tolist() == source.pair_group.tolist() == list(range(12))
    for image in (11, 0, 7):
        assert source.image_bytes(image) == picture(image)
        assert source.image(image).size == (32, 24) and source.caption(image) == f"caption {image}"
    assert source.image_name(7) == "shards/00001.tar 000000007"
    copy = pickle.loads(pickle.dumps(source))
    assert copy.image_bytes(5) == picture(5) and copy.caption(5) == "caption 5"
    rows = [{"image": b"", "caption": [f"caption {n}"]} for n in range(12)]
    write_pairs(tmp_path / "same.arrow", rows)
    assert digest(ArrowPairs(tmp_path, ["same"])) == source.digest


def test_keys_end_at_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    members = [
        ("a.b/c.jpg", picture(1)), ("a.b/c.txt", b"one"),
        ("./d.x.png", picture(2)), ("d.PNG", picture(3, format="PNG")), ("d.cls", b"7"), ("d.txt", b"two"),
        (".hidden.jpg", picture(4)), ("e.json", b'{"caption": " three "}'), ("e.webp", picture(5, format="WEBP")),
    ]  # fmt: skip
    source = TarPairs(write_tar(tmp_path / "t.tar", members).parent, ["t"])
    assert [source.image_name(n) for n in range(3)] == ["t.tar a.b/c", "t.tar d", "t.tar e"]
    assert [source.caption(n) for n in range(3)] == ["one", "two", "three"]
    assert source.image_bytes(1) == picture(3, format="PNG")


def test_the_members_of_a_sample_may_lie_apart_and_txt_goes_before_json(tmp_path: Path) -> None:
    one = sample("a", 1, "from txt", caption="from json")
    two = sample("b", 2)
    write_tar(tmp_path / "t.tar", [one[2], two[0], two[1], one[1], two[2], one[0]])
    source = TarPairs(tmp_path, ["t"])
    assert [source.caption(n) for n in range(2)] == ["from txt", "caption 2"]
    assert source.image_bytes(0) == picture(1)


def test_txt_with_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [("a.jpg", picture()), ("a.txt", "\ufeffein Bär\r\n".encode())])
    assert TarPairs(tmp_path, ["t"]).caption(0) == "ein Bär"


def test_the_index_is_built_once_and_again_when_the_tar_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sclkern.data")
    tar = write_samples(tmp_path / "t.tar", 3)
    TarPairs(tmp_path, ["t"])
    index = tmp_path / "t.tar.index"
    written = index.stat().st_mtime_ns
    assert TarPairs(tmp_path, ["t"]).num_images == 3 and index.stat().st_mtime_ns == written
    assert not caplog.messages
    write_samples(tar, 5)
    assert TarPairs(tmp_path, ["t"]).num_images == 5
    assert [m for m in caplog.messages if "t.tar: its index" in m and "is built again" in m] == caplog.messages
    assert TarPairs(tmp_path, ["t"]).image_bytes(4) == picture(4)


@pytest.mark.parametrize("damage", [b"", b"ARROW1\0\0 nonsense", None])
def test_an_index_that_is_not_whole_is_built_again(tmp_path: Path, damage: bytes | None) -> None:
    write_samples(tmp_path / "t.tar", 3)
    TarPairs(tmp_path, ["t"])
    index = tmp_path / "t.tar.index"
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert TarPairs(tmp_path, ["t"]).caption(2) == "caption 2"
    assert len(index.read_bytes()) == len(whole)


def test_an_index_is_cached_where_the_folder_cannot_be_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "data" / "t.tar", 3)

    def refuse(path: Path, write: object) -> None:
        if "data" in Path(path).parts:
            raise UserError("read-only")
        allowed(path, write)

    import sclkern.data.index as index

    allowed = index.write_atomically
    monkeypatch.setattr(index, "write_atomically", refuse)
    assert TarPairs(tmp_path / "data", ["t"]).num_images == 3
    assert os.listdir(tmp_path / "data") == ["t.tar"] and len(list(cache.rglob("t.tar.index"))) == 1


def test_tars_behind_a_url(cache: Path, tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    for shard in range(2):
        content = write_samples(tmp_path / "t.tar", 3, first=3 * shard).read_bytes()
        fsspec.filesystem("memory").pipe(f"{root}/{shard:05}.tar", content)
    source = open_pairs(root, ["0000{0..1}"])
    assert (source.num_images, source.caption(4)) == (6, "caption 4")
    assert source.image_bytes(4) == picture(4)  # type: ignore[attr-defined]
    assert len(list(cache.rglob("*.tar.index"))) == 2


def test_rows_without_success_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sclkern.data")
    failed = [("b.json", b'{"status": "failed_to_download", "caption": "x"}')]
    write_tar(tmp_path / "00000.tar", [*sample("a", 0), *failed, *sample("c", 1, status="failed_to_resize")])
    columns = {"key": ["a", "b", "d"], "status": ["success", "failed_to_download", "failed_to_download"]}
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    source = TarPairs(tmp_path, ["00000"])
    assert source.num_images == 1 and not source.defects
    assert source.dropped == {"failed_to_download": 2, "failed_to_resize": 1}
    assert "3 rows have no image: failed_to_download 2, failed_to_resize 1" in caplog.text


BROKEN = {
    "no caption": [("x.jpg", picture())],
    "no picture": [("x.txt", b"a cat")],
    "not in UTF-8 (byte 1)": [("x.jpg", picture()), ("x.txt", b"a\xff")],
    "null bytes": [("x.jpg", picture()), ("x.txt", "a cat".encode("utf-16-le"))],
    "blank": [("x.jpg", picture()), ("x.txt", b" \r\n")],
    "no JSON in UTF-8": [("x.jpg", picture()), ("x.json", b"{'caption': 1}")],
    "nested too deeply": [("x.jpg", picture()), ("x.json", b"[" * 100_000)],
    "no JSON object": [("x.jpg", picture()), ("x.json", b"[]")],
    "type int": [("x.jpg", picture()), ("x.json", b'{"caption": 1}')],
    "more than one picture": [("x.jpg", picture()), ("x.png", picture()), ("x.txt", b"a")],
    "expected 1048576 at most": [("x.jpg", picture()), ("x.txt", b"a" * (1 << 20) + b"a")],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_sample_is_left_out_named_and_counted(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "t.tar", [*sample("a", 0), *BROKEN[reason]])
    source = TarPairs(tmp_path, ["t"])
    ((name, why),) = source.defects
    assert source.num_images == 1 and name == "t.tar x" and reason in why
    assert "left out 1 of 2 samples: t.tar x (" in caplog.text and reason in caplog.text
    caplog.clear()
    TarPairs(tmp_path, ["t"])
    assert reason in caplog.text


def test_more_than_one_percent_of_broken_samples_is_an_error(tmp_path: Path) -> None:
    good = [member for number in range(250) for member in sample(f"{number}", number)]
    write_tar(tmp_path / "t.tar", [*good, ("x.txt", b"1"), ("y.txt", b"2")])
    assert TarPairs(tmp_path, ["t"]).num_images == 250
    write_tar(tmp_path / "t.tar", [*good, ("x.txt", b"1"), ("y.txt", b"2"), ("z.txt", b"3")])
    message = message_of(tmp_path)
    assert "3 of 253 samples cannot be used" in message and "the first is t.tar x (it has a caption and no" in message


def test_a_link_in_a_tar_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in sample("a", 0):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert TarPairs(tmp_path, ["t"]).defects == [("t.tar b", "its .txt is a link or has holes, which are not followed")]


def test_every_cut_of_a_tar_is_noticed(tmp_path: Path) -> None:
    whole = write_samples(tmp_path / "t.tar", 2).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in (100, 512, 700, 1024, 3000, end - 600, end, end + 1000):
        (tmp_path / "t.tar").write_bytes(whole[:length])
        message = message_of(tmp_path)
        assert f"{tmp_path}/t.tar" in message and "download or write it again" in message
        assert not (tmp_path / "t.tar.index").exists()


def refused(kind: str) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, content in [*sample("a", 0), *sample("b", 1)]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = whole.getvalue()
    if kind == "cat":
        return content + content
    if kind == "damaged":
        start = content.index(b"b.json")
        return content[:start] + b"\x01" * 512 + content[start + 512 :]
    return {"gzip": gzip.compress(content), "html": b"<!DOCTYPE html>" + b" " * 600, "empty": b""}[kind]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("gzip", "is packed with gzip, expected a plain tar, because a packed one cannot be read at any place"),
        ("html", "is no tar, it begins with b'<!DOCTYPE html> '"),
        ("empty", "is empty, expected a tar"),
        ("cat", "goes on after its end mark"),
        ("damaged", "has a broken header at byte"),
    ],
)
def test_what_is_no_plain_tar_is_refused(tmp_path: Path, kind: str, part: str) -> None:
    (tmp_path / "t.tar").write_bytes(refused(kind))
    assert part in message_of(tmp_path)
    assert os.listdir(tmp_path) == ["t.tar"]


def test_a_file_that_stands_twice_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [*sample("a", 0), *sample("b", 1), *sample("a", 2)])
    assert f"{tmp_path}/t.tar: has a.jpg twice, expected every file once" in message_of(tmp_path)


def test_one_of_several_tars_that_is_broken_is_named(tmp_path: Path) -> None:
    for shard in range(4):
        write_samples(tmp_path / f"{shard}.tar", 2)
    for shard in (2, 3):
        (tmp_path / f"{shard}.tar").write_bytes((tmp_path / f"{shard}.tar").read_bytes()[:2000])
    assert f"{tmp_path}/2.tar: " in message_of(tmp_path, "{0..3}")
    assert f"{tmp_path}/9.tar: no such file" in message_of(tmp_path, "0", "9")


def test_a_tar_that_shrank_after_it_was_opened(tmp_path: Path) -> None:
    tar = write_samples(tmp_path / "t.tar", 2)
    source = TarPairs(tmp_path, ["t"])
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(ValueError, match="it has changed since it was indexed, or was cut short"):
        source.image(1)


def test_a_bomb_and_an_empty_picture_are_undecodable(tmp_path: Path) -> None:
    members = [("a.png", bomb()), ("a.txt", b"bomb"), ("b.jpg", b""), ("b.txt", b"empty"), *sample("c", 1)]
    source = TarPairs(write_tar(tmp_path / "t.tar", members).parent, ["t"])
    with pytest.raises(ValueError, match="unfolds to 400000000 pixels, expected 89478485 at most; shrink it"):
        source.image(0)
    with pytest.raises(ValueError, match="it is empty"):
        source.image(1)
    assert isinstance(source.image(2), Image.Image)


def test_tars_have_no_splits(tmp_path: Path) -> None:
    write_samples(tmp_path / "t.tar", 2)
    assert "split: got 'train', expected none, as .tar files have no splits; select none" in message_of(
        tmp_path, split="train"
    )
    write_tar(tmp_path / "t.tar", [])
    assert "no pair of an image and a caption" in message_of(tmp_path)


@pytest.mark.parametrize(("keep", "part"), [(0.5, "ends without its end mark"), (0, "is empty, expected a tar")])
def test_a_conversion_refuses_a_tar_that_was_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: float, part: str
) -> None:
    write_samples(tmp_path / "00000.tar", 20)
    content = write_samples(tmp_path / "00001.tar", 20, 20).read_bytes()
    (tmp_path / "00001.tar").write_bytes(content[: int(keep * len(content))])
    assert main(["data", "convert", "cc12m", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path}/00001.tar: {part}" in message and "download or write it again" in message
    assert not list(tmp_path.rglob("*.arrow"))
