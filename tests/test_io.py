"""Files and folders that appear whole or not at all."""

import pytest

from sclkern.errors import UserError
from sclkern.io import write_atomically, write_folder


def test_processes_of_one_number_on_two_machines_write_beside_each_other(tmp_path):
    def write(temporary):
        temporary.write_text("mine")
        write_atomically(tmp_path / "file", lambda other: other.write_text("theirs"))
        assert (tmp_path / "file").read_text() == "theirs"

    write_atomically(tmp_path / "file", write)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole(tmp_path):
    def write(folder):
        assert not (tmp_path / "a" / "b").exists()
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")

    write_folder(tmp_path / "a" / "b", write)
    assert (tmp_path / "a" / "b" / "inner" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "b").mkdir()
    write_folder(tmp_path / "b", lambda folder: (folder / "file").touch())
    assert (tmp_path / "b" / "file").exists()


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    def write(folder):
        (folder / "file").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free space"):
        write_folder(tmp_path / "b", write)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(UserError, match="b: is not empty, expected a new folder; remove it, or give another"):
        write_folder(tmp_path / "b", lambda folder: None)
    with pytest.raises(UserError, match="mine: is a file, expected a folder to make"):
        write_folder(tmp_path / "b" / "mine", lambda folder: None)
    assert (tmp_path / "b" / "mine").exists()
