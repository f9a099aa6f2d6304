"""Fine-tuning by several processes and by one that is killed, and evaluations that are the same to the digit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import be_rank, run_ranks, start_copy

import answerable
import sclkern
from sclkern.cli import main
from sclkern.tasks.evaluating import evaluate, load_evaluation
from sclkern.tasks.finetuning import Finetuning
from sclkern.tasks.registered import TASKS
from sclkern.training.checkpoint import load_checkpoint
from sclkern.training.world import Place, World

# One of each kind: answering, reasoning, ranking.
MEASURED = ("vqav2", "nlvr2", "flickr30k")


def by_two(*arguments):
    """Two processes of the command line."""
    root, helpers = Path(sclkern.__file__).parents[1], Path(answerable.__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{helpers}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sclkern.cli"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A command that trains in a folder, and the folder where one process has run it."""
    folder = tmp_path_factory.mktemp("one")
    data, checkpoint = answerable.flickr30k(folder, 60), answerable.checkpoint(folder / "checkpoint", dropout=0.1)

    def command(output, **changes):
        changes = {"data__root": data, "run__output_dir": output, "optimizer__eps": 1e-5, **changes}
        fixed = {"task__epochs": "null", "task__val_epochs": "null", "run__max_steps": 4, "run__save_every": 2}
        fixed |= {"task__global_batch": 8, "run__batch_size": 8}
        start = ["finetune", "flickr30k", "--checkpoint", str(checkpoint)]
        return [*start, *answerable.overrides(**{**fixed, **changes})]

    assert main(command(folder / "run")) == 0
    return command, folder / "run"


def states(*folders):
    return [load_checkpoint(folder / "checkpoints" / "latest.pt")["model"] for folder in folders]


def results(folder):
    return json.loads((folder / "results.json").read_text())["values"]


def test_two_processes_train_what_one_does(one, tmp_path):
    command, alone = one
    by_two(*command(tmp_path, run__batch_size=4))
    first, second = states(alone, tmp_path)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-4, atol=1e-4)
    assert results(alone) == results(tmp_path)


def test_a_run_that_was_killed_goes_on_to_the_same_weights_and_metrics(one, tmp_path):
    command, alone = one
    arguments = command(tmp_path / "run")
    killed = start_copy([__file__, "killed", json.dumps(arguments)], tmp_path / "log")
    killed.join(180)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"] == 2
    assert main([*arguments, "--resume"]) == 0
    first, second = states(alone, tmp_path / "run")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert results(alone) == results(tmp_path / "run")


def be_killed(arguments):
    """``kill -9`` where the last step begins, with the checkpoint of the second one written."""
    original = Finetuning._next

    def killed(run, batches):
        if run.state.step == 3:
            run.keeper.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(run, batches)

    Finetuning._next = killed
    main(arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the data of each kind of task, and a model with its heads."""
    root = tmp_path_factory.mktemp("measured")
    for name in MEASURED:
        data = getattr(answerable, name)(root / name, 60)
        answers = data / "vqav2_answers.json"
        sizes = {"vqa_answers": len(json.loads(answers.read_text()))} if answers.exists() else {}
        sizes |= {"token_types": 3} if name == "nlvr2" else {}
        # So large that answers differ without training.
        sizes |= {"heads": TASKS[name].heads, "patch_mask_token": False, "init_std": 0.6}
        torch.manual_seed(0)
        answerable.checkpoint(root / name / "checkpoint", **sizes)
    return root


def measure(root, rank=0, size=1):
    """What each task finds, with batches that no number of processes divides."""
    found = {}
    for name in MEASURED:
        options = ["run.device=cpu", "task.evaluation_batch=7", "task.rerank=4"]
        config = load_evaluation(TASKS[name], root / name / "checkpoint", root / name / "arrow", options)
        found[name] = evaluate(TASKS[name], config, world=World(Place(rank, size, rank)))._replace(about={})
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_measures_the_same_to_the_digit(measured, size, tmp_path):
    (tmp_path / "data").symlink_to(measured)
    alone = measure(measured)
    assert len({entry["answer"] for entry in alone["vqav2"].submission}) > 1
    assert 0 < alone["nlvr2"].values["consistency"] < 1 and 0 < alone["flickr30k"].values["rsum"] < 6
    assert all(found == alone for found in run_ranks(__file__, size, tmp_path))


def work(rank, size, folder):
    torch.set_num_threads(1)
    return measure(folder / "data", rank, size)


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        be_killed(json.loads(sys.argv[2]))
    else:
        be_rank(work)
