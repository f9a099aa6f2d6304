"""Faults of a run of two processes, provoked: nothing is lost beyond the last checkpoint, and the run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sclkern.training.checkpoint import load_checkpoint
from sclkern.training.config import load_config
from sclkern.training.pretraining import Pretraining
from sclkern.training.watchdog import HANGS
from tiny_run import NO_LAYERS, overrides, small_data

PROGRAM = Path(__file__).parents[1] / "helpers" / "faulty_run.py"
# On a batch of 16 with 24 pairs, steps 2 and more are of further epochs.
OPTIONS = {**NO_LAYERS, "run__max_steps": 6, "run__save_every": 2, "evaluation__rerank": 0}
OPTIONS |= {"evaluation__train_images": 0, "evaluation__attention_images": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


class Run:
    """Runs in a folder, each of two processes."""

    def __init__(self, folder, data):
        self.folder, self.data = folder, data
        self.checkpoints = folder / "run" / "checkpoints"

    def start(self, *faults, restarts=0, **changes):
        arguments = overrides(self.folder / "run", **{**OPTIONS, **self.data, **changes})
        launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), str(PROGRAM)]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, json.dumps(faults), *arguments, "--resume"],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *faults, status=0, **options):
        """Run to the end; returns what was written to stderr."""
        process = self.start(*faults, **options)
        _, error = process.communicate(timeout=300)
        assert process.returncode == status, error
        assert "ready" not in os.listdir(self.folder)
        return error

    def signal_when_ready(self, process, number):
        """Send a signal to the launcher and all of its processes as soon as a fault waits for it; returns stderr."""
        while process.poll() is None and not (self.folder / "ready").exists():
            time.sleep(0.02)
        for pid in family(process.pid):
            os.kill(pid, number)
        _, error = process.communicate(timeout=120)
        (self.folder / "ready").unlink()
        return error

    def saved(self):
        return load_checkpoint(self.checkpoints / "latest.pt")


@pytest.fixture
def run(tmp_path, data):
    return Run(tmp_path, data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The last checkpoint of a run without faults."""
    run = Run(tmp_path_factory.mktemp("whole"), data)
    run.run()
    return run.saved()


def family(pid):
    """A process and all that it has started: torchrun gives each rank a group of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


def lines_of(error):
    """What the run says of its error: the lines of each rank."""
    return [line for line in error.splitlines() if line.startswith("sclkern pretrain: error: ")]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) if isinstance(a, dict) else a == b


def assert_same_run(a, b):
    """Bit for bit."""
    for key in ("step", "validated", "best", "model"):
        assert same(a[key], b[key]), key
    assert same(a["optimizer"]["state"], b["optimizer"]["state"])


def test_torchrun_goes_on_by_itself(run, whole):
    """After kill -9 of one rank, before anything is saved, and of the other afterwards."""
    run.run(("kill", 1, 1, 0), ("kill", 0, 4, 1), restarts=2)
    assert_same_run(run.saved(), whole)


def test_a_run_outlives_one_fault_after_the_other(run, whole, data):
    """Each start ends by another fault, and the last goes on to the end."""
    # All are killed while the checkpoint of step 4 is written; that of step 2 is whole.
    process = run.start(("write", 0, 4, 0))
    run.signal_when_ready(process, signal.SIGKILL)
    assert run.saved()["step"] == 2 and list(run.checkpoints.glob(".latest.pt.*.tmp"))
    shutil.copytree(run.folder / "run", run.folder / "other")
    # One process goes on with the global batch of two; its sums have another order.
    changes = {**OPTIONS, **data, "run__batch_size": 16}
    assert Pretraining(load_config(None, overrides(run.folder / "other", **changes)), resume=True).run()
    other = load_checkpoint(run.folder / "other" / "checkpoints" / "latest.pt")
    for name, value in whole["model"].items():
        torch.testing.assert_close(other["model"][name], value, rtol=1e-3, atol=1e-4)
    # The group gets SIGTERM, as from SLURM and systemd. The step is taken and saved.
    process = run.start(("sigterm", 0, 3, 0))
    run.signal_when_ready(process, signal.SIGTERM)
    assert run.saved()["step"] == 3 and not list(run.checkpoints.glob(".*.tmp"))
    # Not a number in a batch of one rank: all stop, and the message names that rank.
    error = run.run(("nan", 1, 4, 0), status=1)
    told = (
        r"step 4: image t.arrow row \d+ \(\d+\) on rank 1 is not finite; the checkpoint of step 3 is kept; look at this"
    )
    assert re.search(told, error), error
    assert run.saved()["step"] == 3
    # A disk is full, when the checkpoint of step 4 is written.
    error = run.run(("full", 0, 4, 0), status=1)
    assert len(lines_of(error)) == 1 and "latest.pt: cannot be written (No space left on device)" in error
    assert "exitcode  : 2" in error
    assert run.saved()["step"] == 3 and not list(run.checkpoints.glob(".*.tmp"))
    run.run()
    assert_same_run(run.saved(), whole)


def test_a_data_worker_is_killed(run):
    error = run.run(("worker", 1, 3, 0), status=1, data__num_workers=1)
    assert "exitcode  : 3" in error and "rank 1: a data worker" in error and "was killed by SIGKILL" in error
    assert run.saved()["step"] >= 2


@pytest.mark.parametrize("kind", ["hang", "stopped"])
def test_a_rank_hangs(run, kind):
    error = run.run((kind, 1, 4, 0), status=1, run__watchdog_seconds=10)
    (line,) = lines_of(error)
    # A process that is stopped was last heard of some steps before.
    told = r"rank 1 hangs for \d+ s in step 4, in " if kind == "hang" else r"rank 1 has stopped in step \d, in "
    assert re.search(told, line), line
    assert "; rank 0 waits in " in line and "called by " in line.partition("; rank 0")[2]
    assert f"exitcode  : {HANGS}" in error
    assert run.saved()["step"] == 2
