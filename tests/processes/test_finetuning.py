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


@pytest.mark.parametrize("task", ["vqav2", "flickr30k"])
def test_two_processes_train_and_measure_what_one_does(tmp_path, capsys, task):
    data = getattr(answerable, task)(tmp_path / task, 60)
    checkpoint = answerable.checkpoint(tmp_path / "checkpoint", dropout=0.1)

    def finetune(folder, **changes):
        changes = {"data__root": data, "run__output_dir": folder, "optimizer__eps": 1e-5, **changes}
        fixed = {"task__epochs": "null", "task__val_epochs": "null", "run__max_steps": 6}
        return ["finetune", task, "--checkpoint", checkpoint, *answerable.overrides(**fixed, **changes)]

    one, two = tmp_path / "one", tmp_path / "two"
    assert main(list(map(str, finetune(one)))) == 0
    by_two(*finetune(two, run__batch_size=16))
    alone, together = (load_checkpoint(folder / "checkpoints" / "latest.pt")["model"] for folder in (one, two))
    for name, weight in alone.items():
        torch.testing.assert_close(weight, together[name], rtol=1e-4, atol=1e-4)
    assert (one / "results.json").read_text() == (two / "results.json").read_text()
    evaluate = ["evaluate", task, "--checkpoint", two, "--data", data, "run.device=cpu"]
    capsys.readouterr()
    assert main(list(map(str, evaluate))) == 0
    own = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert own == json.loads(by_two(*evaluate)[-1]) == json.loads((two / "results.json").read_text())["values"]
