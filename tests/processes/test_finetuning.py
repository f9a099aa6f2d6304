"""Fine-tuning by two processes: the weights of one, and an evaluation that is the same to the digit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import answerable
import sclkern
from sclkern.cli import main
from sclkern.training.checkpoint import load_checkpoint


def by_two(*arguments):
    """The last line that two processes print."""
    root, helpers = Path(sclkern.__file__).parents[1], Path(answerable.__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{helpers}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sclkern.cli"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture
def one(tmp_path):
    """one(task, pictures) -> the command that trains in a folder, and the folder where one process has run it."""

    def run(task, pictures):
        data = getattr(answerable, task)(tmp_path / task, pictures)
        checkpoint = answerable.checkpoint(tmp_path / "checkpoint", dropout=0.1)

        def command(folder, **changes):
            changes = {"data__root": data, "run__output_dir": folder, "optimizer__eps": 1e-5, **changes}
            fixed = {"task__epochs": "null", "task__val_epochs": "null", "run__max_steps": 4}
            fixed |= {"task__global_batch": 8, "run__batch_size": 8}
            return ["finetune", task, "--checkpoint", str(checkpoint), *answerable.overrides(**{**fixed, **changes})]

        assert main(command(tmp_path / "one")) == 0
        return command, tmp_path / "one"

    return run


def test_two_processes_train_what_one_does(one, tmp_path):
    command, alone = one("flickr30k", 60)
    by_two(*command(tmp_path / "two", run__batch_size=4))
    first, second = (load_checkpoint(folder / "checkpoints" / "latest.pt") for folder in (alone, tmp_path / "two"))
    for name, weight in first["model"].items():
        torch.testing.assert_close(weight, second["model"][name], rtol=1e-4, atol=1e-4)
    assert (alone / "results.json").read_text() == (tmp_path / "two" / "results.json").read_text()


def test_two_processes_measure_what_one_does_to_the_digit(one, tmp_path, capsys):
    _, alone = one("vqav2", 60)
    evaluate = ["evaluate", "vqav2", "--checkpoint", str(alone), "--data", str(tmp_path / "vqav2" / "arrow")]
    found = json.loads((alone / "results.json").read_text())["values"]
    assert json.loads(by_two(*evaluate, "run.device=cpu", "task.evaluation_batch=7")[-1]) == found
