"""A conversion that is killed goes on, and its files have the bytes of one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import look_alikes
from sclkern.data.convert import PartWriter, convert
from sclkern.errors import UserError

ROOT = Path(__file__).parents[2]
# Two rows a part, and a wait in each, so that there is time to kill it.
SCRIPT = """
import sys, time
from sclkern.data import convert as package
write = package.PartWriter.__call__
def slowly(self, part):
    time.sleep(0.05)
    return write(self, part)
package.PartWriter.__call__ = slowly
package.convert("coco", sys.argv[1], sys.argv[2], workers=2, part_rows=2)
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if not path.name.startswith(".")}


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch):
    root = look_alikes.coco(tmp_path / "in", defects=("truncated", "missing")).root
    convert("coco", root, tmp_path / "whole", workers=1, part_rows=2)
    output = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), str(output)], env=environment)
    while len(list(output.glob(".coco.parts/*/*.arrow"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(output.glob(".coco.parts/*/*.arrow")))
    assert finished >= 1
    written = []
    real = PartWriter._read

    def counted(self, table, row, report):
        written.append(row)
        return real(self, table, row, report)

    monkeypatch.setattr(PartWriter, "_read", counted)
    convert("coco", root, output, workers=1, part_rows=2)
    assert contents(output) == contents(tmp_path / "whole")
    assert 0 < len(written) < 45  # what was finished is not read again
    written.clear()
    convert("coco", root, output, workers=1, part_rows=2)
    assert written == [] and contents(output) == contents(tmp_path / "whole")
    assert [path.name for path in output.glob(".*")] == []


def test_a_part_that_was_cut_is_written_again(tmp_path):
    root = look_alikes.sbu(tmp_path / "in").root
    convert("sbu", root, tmp_path / "out", workers=1, part_rows=8)
    whole = contents(tmp_path / "out")
    path = tmp_path / "out" / "sbu_0.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    convert("sbu", root, tmp_path / "out", workers=1, part_rows=8)
    assert contents(tmp_path / "out") == whole


def test_fewer_workers_give_the_same_bytes(tmp_path):
    root = look_alikes.vg(tmp_path / "in").root
    for workers in (1, 2):
        convert("vg", root, tmp_path / str(workers), workers=workers, part_rows=4)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_other_tables_of_an_earlier_conversion_are_an_error(tmp_path):
    root = look_alikes.cc3m(tmp_path / "in").root
    convert("cc3m", root, tmp_path / "out", workers=1)
    (root / "val_annot.json").unlink()
    with pytest.raises(UserError, match=r"conceptual_caption_val_0\.arrow of an earlier conversion of cc3m"):
        convert("cc3m", root, tmp_path / "out", workers=1)
