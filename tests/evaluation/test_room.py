import errno
import os
import tempfile

import pytest
import torch

from sclkern.errors import UserError
from sclkern.evaluation.room import Room, _free_memory


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


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/job", "sys/fs/cgroup/job", ("max", "current", "inactive_file")),
        ("4:cpu,memory:/job", "sys/fs/cgroup/memory/job", ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")),
    ],
)
def test_the_memory_of_a_job_is_what_its_group_leaves(tmp_path, line, folder, files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert _free_memory(tmp_path) == 5_120_000
    (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    assert _free_memory(tmp_path) == 5_120_000
    group, (limit, used, cached) = tmp_path / folder, files
    group.mkdir(parents=True)
    (group / "memory.stat").write_text(f"anon 5\n{cached} 300\n")
    (group / f"memory.{used}").write_text("900\n")
    (group / f"memory.{limit}").write_text("max\n")
    assert _free_memory(tmp_path) == 5_120_000
    (group / f"memory.{limit}").write_text("1000\n")
    assert _free_memory(tmp_path) == 1000 - 900 + 300


def test_without_linux_little_memory_is_taken(tmp_path):
    assert _free_memory(tmp_path) == 2**31
