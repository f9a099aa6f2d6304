import errno
import os
import tempfile

import pytest
import torch

from sclkern.errors import UserError
from sclkern.evaluation.room import Room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_memory_cannot_hold_lies_in_a_file_without_a_name(tmp_path, dtype):
    room = Room(memory=100, folder=tmp_path)
    small, large = room.tensor((5, 2), dtype), room.tensor((300, 7), dtype)
    assert room.taken == {"device": 0, "memory": 10 * dtype.itemsize, "file": 2100 * dtype.itemsize}
    assert list(tmp_path.iterdir()) == []
    values = torch.randn(300, 7).to(dtype)
    large.copy_(values)
    del room
    assert torch.equal(large[100:200], values[100:200]) and torch.equal(large.T, values.T)
    assert small.dtype == large.dtype == dtype


def test_memory_is_given_out_once(tmp_path):
    room = Room(memory=100, folder=tmp_path)
    room.tensor((60,), torch.uint8)
    room.tensor((60,), torch.uint8)
    assert room.taken == {"device": 0, "memory": 60, "file": 60}


def test_nothing_takes_no_file(tmp_path):
    assert Room(memory=0, folder=tmp_path / "none").tensor((0, 7), torch.float32).shape == (0, 7)


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for 4\.0 GB of features \(No space left on device\).* set TMPDIR"):
        Room(memory=0, folder=tmp_path).tensor((10**9,), torch.float32)


def test_files_go_where_temporary_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"missing: no room for .* \(No such file or directory\)"):
        Room(memory=0).tensor((10,), torch.float32)
