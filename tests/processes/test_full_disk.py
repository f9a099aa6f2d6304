"""A disk that is full, not one that says so: a file system of a few megabytes, which a namespace of its own may mount.

``python test_full_disk.py FOLDER`` is the program that runs on it.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environment

from same_state import assert_states_equal
from sclkern.cli import main
from sclkern.training.checkpoint import load_checkpoint
from sclkern.training.pretraining import Pretraining
from tiny_run import NO_LAYERS, overrides, small_data

IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
# A checkpoint and a half, and what else a run writes.
SIZE = "size=9m"
STEPS = 40
CHANGES = {**NO_LAYERS, "run__max_steps": STEPS, "run__keep": 1, "run__save_every": 0, "evaluation__rerank": 0}
CHANGES |= {"evaluation__train_images": 0, "evaluation__attention_images": 0}


def pretrain(disk, *arguments):
    """Status, the last line of stderr, and what is left of the checkpoints."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        status = main(["pretrain", *overrides(disk / "run", **CHANGES, **small_data(disk)), "--resume", *arguments])
    checkpoints = disk / "run" / "checkpoints"
    steps = {path.name: load_checkpoint(path)["step"] for path in checkpoints.glob("*.pt")}
    return status, told.getvalue().strip().splitlines()[-1], steps, [path.name for path in checkpoints.glob(".*")]


def fill(path):
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def run_on(disk):
    """What each start says: checkpoints that fit, a second that does not, a log that does not, no rights, and space."""
    told, rest, step = [], disk / "rest", Pretraining.train_step
    told.append(pretrain(disk, "run.stop_at=2"))
    told.append(pretrain(disk, "run.stop_at=4"))

    def fills(self, *arguments):
        if not rest.exists():
            fill(rest)
        step(self, *arguments)

    Pretraining.train_step = fills
    told.append(pretrain(disk))
    Pretraining.train_step = step
    rest.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    checkpoints = disk / "run" / "checkpoints"
    for mount in (["--bind", checkpoints, checkpoints], ["-o", "remount,bind,ro", checkpoints]):
        subprocess.run(["mount", *mount], check=True)
    told.append(pretrain(disk))
    subprocess.run(["umount", checkpoints], check=True)
    told.append(pretrain(disk))
    return told


@pytest.fixture
def namespace():
    """Skips where nobody but root may mount."""
    try:
        allowed = subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("needs unshare, and a kernel that lets users have namespaces of their own")
    return IN_A_NAMESPACE


def test_a_run_on_a_full_disk_loses_nothing_and_goes_on_when_there_is_space(namespace, tmp_path):
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    whole.mkdir()
    mounts = f'mount -t tmpfs -o {SIZE} none "$1" && exec "$2" "$3" "$1" "$4"'
    done = subprocess.run(
        [*namespace, "sh", "-ec", mounts, "sh", disk, sys.executable, __file__, whole],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, third, fourth, last = json.loads(done.stdout)
    place, saved = disk / "run", [{"latest.pt": 2}, []]
    assert first[0] == 0 and first[2:] == saved
    assert second[0] == 2 and second[2:] == saved
    assert f"{place}/checkpoints/latest.pt: cannot be written (No space left on device); an earlier" in second[1]
    assert third[0] == 2 and third[2:] == saved
    assert f"{place}/metrics.jsonl: cannot be written (No space left on device); free space, then" in third[1]
    assert fourth[0] == 2 and fourth[2:] == saved
    assert f"{place}/checkpoints: Read-only file system; give a run.output_dir that can be written" in fourth[1]
    assert last[0] == 0 and last[2]["latest.pt"] == STEPS
    assert_states_equal(*(load_checkpoint(whole / name)["model"] for name in ("full.pt", "whole.pt")))


if __name__ == "__main__":
    disk, whole = Path(sys.argv[1]), Path(sys.argv[2])
    told = run_on(disk)
    (whole / "full.pt").write_bytes((disk / "run" / "checkpoints" / "latest.pt").read_bytes())
    assert pretrain(whole)[0] == 0
    (whole / "run" / "checkpoints" / "latest.pt").rename(whole / "whole.pt")
    print(json.dumps(told))
