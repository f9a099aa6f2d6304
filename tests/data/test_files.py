"""Files below a root: local or behind a URL, the same names and the same refusals."""

from __future__ import annotations

import importlib.util
import os
import pickle
import uuid
from pathlib import Path

import fsspec
import pytest

from sclkern.data import open_pairs, resolve_root
from sclkern.data.files import DataFolder, FileInfo
from sclkern.data.names import is_url
from sclkern.data.sources.arrow import write_pairs
from sclkern.errors import UserError

CONTENT = {"a.tar": b"0123456789", "b/c.tar": b"xyz", "b/d.json": b"[]", ".hidden.tar": b""}


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> DataFolder:
    """A folder with ``CONTENT``, opened as a path, a file:// and a memory:// URL."""
    if request.param == "memory":
        root = f"memory://{uuid.uuid4().hex}"
        for name, content in CONTENT.items():
            fsspec.filesystem("memory").pipe(f"{root}/{name}", content)
        return DataFolder(root)
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return DataFolder(tmp_path if request.param == "local" else tmp_path.as_uri())


def message_of(action: object, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        action(*args)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_are_read_whole_and_in_ranges(folder: DataFolder) -> None:
    assert folder.read("a.tar") == b"0123456789"
    assert folder.read("a.tar", 3, 4) == b"3456" and folder.read("a.tar", 9, 0) == b""
    with folder.open("a.tar") as file:
        file.seek(8)
        assert file.read() == b"89"
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.read("b/c.tar") == b"xyz"


def test_a_range_that_is_not_there_is_an_error(folder: DataFolder) -> None:
    assert "ends at byte 10, expected 12 or more" in message_of(folder.read, "a.tar", 8, 4)
    assert "x.tar: no such file" in message_of(folder.read, "x.tar")
    assert "x.tar: no such file" in message_of(folder.open, "x.tar")


def test_a_server_that_gives_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{root}/a.tar", b"0123456789")
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start, end: b"0123456789")
    assert "as it cannot give a range of a file; copy" in message_of(DataFolder(root).read, "a.tar", 2, 3)


def test_size_and_version(folder: DataFolder) -> None:
    info = folder.info("a.tar")
    assert isinstance(info, FileInfo) and info.size == 10 and info.stamp
    assert folder.info("x.tar") is None and folder.info("b") is None
    assert folder.is_dir() and folder.is_dir("b") and not folder.is_dir("a.tar") and not folder.is_dir("x")


def test_files_are_listed(folder: DataFolder) -> None:
    assert folder.glob("*.tar") == ["a.tar"] and folder.glob("b/*") == ["b/c.tar", "b/d.json"]
    assert folder.glob("x*") == []
    assert folder.names_in("b") == {"c.tar", "d.json"} and folder.names_in("x") == set()
    assert folder.names_in() == {"a.tar", ".hidden.tar"}


def test_tables_are_names_ranges_and_patterns(folder: DataFolder) -> None:
    assert folder.tables(["a", "b/c"], [".tar"]) == ["a.tar", "b/c.tar"]
    assert folder.tables(["a.tar", "missing"], [".tar"]) == ["a.tar", "missing.tar"]
    assert folder.tables(["{08..11}/{x,y}"], [".tar"])[1:4] == ["08/y.tar", "09/x.tar", "09/y.tar"]
    assert folder.tables(["*", "b/*"], [".tar", ".json"]) == ["a.tar", "b/c.tar", "b/d.json"]
    assert "no file q*.tar, expected one or more" in message_of(folder.tables, ["q*"], [".tar"])
    assert "no table is named" in message_of(folder.tables, [], [".tar"])
    for wrong in ("{3..1}", "{x}", "{1..2..3}"):
        assert f"tables: '{wrong}' has {wrong}, expected a rising range" in message_of(folder.tables, [wrong], [".tar"])
    assert "stands for 1000000000 names" in message_of(folder.tables, ["{000..999}" * 3], [".tar"])


def test_a_file_of_exactly_this_name_goes_before_a_pattern(tmp_path: Path) -> None:
    for name in ("[ab]{1..2}.tar", "a.tar", "t.tar", "t.json"):
        (tmp_path / name).touch()
    folder = DataFolder(tmp_path)
    assert folder.tables(["[ab]{1..2}"], [".tar"]) == ["[ab]{1..2}.tar"]
    assert "has t.tar and t.json, expected one file of the table 't'" in message_of(
        folder.tables, ["t"], [".tar", ".json"]
    )
    assert folder.tables(["t.json"], [".tar", ".json"]) == ["t.json"]


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/passwd", "a\0b", "file:///etc/passwd", "b\\..\\c"])
def test_names_that_leave_the_folder_are_refused(folder: DataFolder, name: str) -> None:
    for action in (folder.open, folder.read, folder.info, folder.glob, folder.names_in, folder.local_copy):
        assert "leads out of the folder or is not plain" in message_of(action, name)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "b" / "file.txt").write_text("plain")
    (root / "out.txt").symlink_to(tmp_path / "secret.txt")
    (root / "up").symlink_to("..")
    (root / "inside.txt").symlink_to("b/file.txt")
    (tmp_path / "root2").mkdir()
    (root / "beside").symlink_to(tmp_path / "root2")
    folder = DataFolder(root)
    assert folder.read("inside.txt") == b"plain"
    for name in ("out.txt", "up/secret.txt", "beside/x"):
        message = message_of(folder.read, name)
        assert f"{name}: a symbolic link leads out of the folder" in message and "copy the file there" in message
    link = tmp_path / "link"
    link.symlink_to(root)
    assert DataFolder(link).read("b/file.txt") == b"plain"


def test_a_file_behind_a_url_is_copied_once_for_each_version(
    folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCLKERN_CACHE", str(tmp_path / "cache"))
    copy = folder.local_copy("a.tar")
    assert copy.read_bytes() == b"0123456789"
    if folder.local_root is not None:
        assert copy == folder.path("a.tar") and not (tmp_path / "cache").exists()
        return
    assert "behind a URL, expected a local file" in message_of(folder.path, "a.tar")
    written = copy.stat().st_mtime_ns
    assert folder.local_copy("a.tar") == copy and copy.stat().st_mtime_ns == written
    fsspec.filesystem("memory").pipe(f"{folder.root}/a.tar", b"new")
    assert folder.local_copy("a.tar").read_bytes() == b"new"


def test_arrow_files_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCLKERN_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "t.arrow", [{"image": b"1", "caption": ["a cat"]}])
    root = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe(f"{root}/t_0.arrow", (tmp_path / "t.arrow").read_bytes())
    fsspec.filesystem("memory").pipe(f"{root}/t_1.arrow", (tmp_path / "t.arrow").read_bytes())
    source = open_pairs(root, ["t_{0..1}"])
    assert (source.num_images, source.caption(1), source.image_name(1)) == (2, "a cat", "t_1.arrow row 0")
    assert "t_2.arrow does not exist; the .arrow files there: t_0.arrow, t_1.arrow" in message_of(
        open_pairs, root, ["t_2"]
    )


@pytest.mark.parametrize(
    ("root", "part"),
    [
        ("s3://bucket/folder", "needs a package that is not installed"),
        ("nothing://folder", "cannot be opened (Protocol not known: nothing)"),
    ],
)
def test_a_protocol_that_cannot_be_used_is_named_with_the_remedy(root: str, part: str) -> None:
    if root.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    message = message_of(DataFolder, root)
    assert message.startswith(f"data.root: {root!r}") and part in message


def test_what_is_a_url() -> None:
    assert all(map(is_url, ["s3://b", "memory://", "simplecache::s3://b", "file:///a"]))
    assert not any(map(is_url, ["demo", "/a", "a:b", "./s3://b", Path("s3://b")]))
    assert resolve_root("s3://b/c") == "s3://b/c" and resolve_root("a/b") == Path("a/b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for read in (
        DataFolder(tmp_path).open,
        DataFolder(tmp_path).read,
        lambda name: DataFolder(tmp_path).read(name, 0, 4),
    ):
        with pytest.raises(UserError, match=r"a\.jpg: cannot be read \(it is no regular file\)"):
            read("a.jpg")
