"""The script under torchrun and by hand: it ends as one process does, and no process is left behind.

``python test_pretrain.py CASE ARGUMENTS`` is the program of a rank in which something goes wrong.
"""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from ranks import environment

import sclkern
from sclkern.cli import main
from sclkern.errors import UserError
from sclkern.training.checkpoint import load_checkpoint
from sclkern.training.pretraining import Pretraining
from tiny_run import NO_LAYERS, overrides

TWO = {"run__batch_size": 4, "run__device": "cpu", "evaluation__train_images": 0, "evaluation__attention_images": 1}
SECONDS = 240


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *arguments], env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return str(taken.getsockname()[1])


@pytest.fixture
def start():
    """Start the ranks of a world by hand, each with a command of its own; all are ended with the test."""
    started = []

    def start(*commands, world=2):
        port = free_port()
        for rank, command in enumerate(commands):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost"}
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    env=environment(MASTER_PORT=port, **{name: str(value) for name, value in place.items()}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(processes):
    """Statuses, and how each process says that it ends; torch and gloo say more."""
    told = [process.communicate(timeout=SECONDS)[1].splitlines() for process in processes]
    ends = [[line for line in lines if line.startswith(("sclkern pretrain: error: ", "stopped "))] for lines in told]
    return [process.returncode for process in processes], [line[-1] if line else "" for line in ends]


def latest(folder):
    return load_checkpoint(folder / "checkpoints" / "latest.pt")


def test_torchrun_trains_and_another_number_of_processes_goes_on(tmp_path):
    # Rounding errors are the whole gradient of some parameters: AdamW must not blow them up.
    changes = {**TWO, "run__max_steps": 4, "run__save_every": 0, "optimizer__eps": 1e-5}
    done = torchrun("-m", "sclkern.pretrain", *overrides(tmp_path / "two", **changes), "--resume", "run.stop_at=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("backend auto") == 1 and "parallel ddp of 2 processes" in done.stdout
    assert "2 processes x 4 x 1 = 8" in done.stdout
    assert latest(tmp_path / "two")["step"] == 2 and latest(tmp_path / "two")["global_batch"] == 8
    # One process goes on, and ends as one that was alone from the start.
    alone = {**changes, "run__batch_size": 8}
    assert main(["pretrain", *overrides(tmp_path / "two", **alone), "--resume"]) == 0
    assert main(["pretrain", *overrides(tmp_path / "one", **alone)]) == 0
    for name, weight in latest(tmp_path / "one")["model"].items():
        torch.testing.assert_close(weight, latest(tmp_path / "two")["model"][name], rtol=1e-4, atol=1e-4)


def test_fsdp_trains_goes_on_validates_and_exports(tmp_path):
    changes = {**TWO, **NO_LAYERS, "run__max_steps": 2, "run__parallel": "fsdp"}
    command = ["-m", "sclkern.pretrain", *overrides(tmp_path / "run", **changes), "--resume"]
    done = torchrun(*command, "run.stop_at=1")
    assert done.returncode == 0, done.stderr[-3000:]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "from step 1" in done.stdout and done.stdout.count("report.md") == 1
    assert (tmp_path / "run" / "report.md").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    model = sclkern.SCLModel.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_process_that_does_not_come_is_named(start, tmp_path):
    arguments = overrides(tmp_path / "run", **TWO, run__preflight_seconds=5)
    statuses, lines = ended(start(["-m", "sclkern.pretrain", *arguments]))
    assert statuses == [2]
    assert "rank 1 of 2 did not come within run.preflight_seconds=5; look at what they print" in lines[0]


def test_a_process_of_another_configuration_is_named(start, tmp_path):
    command = ["-m", "sclkern.pretrain", *overrides(tmp_path / "run", **TWO)]
    statuses, lines = ended(start(command, [*command, "run.seed=1"]))
    assert statuses == [2, 2]
    assert all("rank 1 on " in line and ": run.seed is 1, on rank 0 (" in line for line in lines), lines
    assert not (tmp_path / "run").exists()


def test_all_end_with_the_message_and_status_of_the_one_that_failed(start, tmp_path):
    command = [__file__, "fails", *overrides(tmp_path / "run", **TWO, **NO_LAYERS, run__save_every=0)]
    statuses, lines = ended(start(command, command))
    assert statuses == [2, 2]
    assert lines[1] == "sclkern pretrain: error: the fourth step cannot be"
    assert lines[0] == "sclkern pretrain: error: rank 1: the fourth step cannot be"
    assert latest(tmp_path / "run")["step"] == 3


def test_a_signal_for_one_stops_all_after_the_same_step(start, tmp_path):
    command = ["-m", "sclkern.pretrain", *overrides(tmp_path / "run", **TWO, run__max_steps=10000, run__save_every=0)]
    processes = start(command, command)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    statuses, lines = ended(processes)
    assert statuses == [0, 0], lines
    step = latest(tmp_path / "run")["step"]
    assert lines[0] == f"stopped at step {step}, saved; go on with --resume"


def fail_at_the_fourth_step():
    train_step = Pretraining.train_step

    def fails(self, batches, run_log):
        if self.world.rank == 1 and self.state.step == 3:
            raise UserError("the fourth step cannot be")
        train_step(self, batches, run_log)

    Pretraining.train_step = fails


if __name__ == "__main__":
    fail_at_the_fourth_step()
    sys.exit(main(["pretrain", *sys.argv[2:]]))
