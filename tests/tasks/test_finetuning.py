"""Fine-tuning on visual question answering end to end: it learns, it resumes, and evaluation repeats its metric."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import answerable
from sclkern.cli import main
from sclkern.cli.parser import TASKS as NAMES
from sclkern.tasks.config import TaskConfig
from sclkern.tasks.registered import TASKS
from sclkern.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return answerable.vqav2(tmp_path_factory.mktemp("vqav2"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return answerable.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def finished(data, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(finetune(data, checkpoint, folder)) == 0
    return folder


def finetune(data, checkpoint, folder, **changes):
    changes = {"data__root": data, "run__output_dir": folder, **changes}
    return ["finetune", "vqav2", "--checkpoint", str(checkpoint), *answerable.overrides(**changes)]


def evaluate(data, folder, *arguments):
    return ["evaluate", "vqav2", "--checkpoint", str(folder), "--data", str(data), "run.device=cpu", *arguments]


def printed(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_line_and_the_page_have_every_task_and_key():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    assert tuple(TASKS) == NAMES
    assert all(f"| `{name}` |" in page for name in TASKS)
    keys = {field.name for field in dataclasses.fields(TaskConfig)} - {"name", "recipe"}
    assert set(re.findall(r"^\| `task\.(\w+)` \|", page, re.M)) == keys


def test_it_beats_chance(finished):
    # The best constant answers to both questions are right for 25 and 75 % of the pictures.
    found = json.loads((finished / "results.json").read_text())
    assert found["values"]["vqa_score"] >= 0.5 + 0.2
    assert found["tables"] == ["vqav2_val"]


def test_evaluation_repeats_the_metric_to_the_digit(finished, data, capsys):
    assert main(evaluate(data, finished)) == 0
    assert printed(capsys) == json.loads((finished / "results.json").read_text())["values"]


def test_the_official_score_and_the_submission(finished, data, tmp_path, capsys):
    annotations = data.parent / "raw" / "v2_mscoco_val2014_annotations.json"
    assert main(evaluate(data, finished, "--annotations", str(annotations))) == 0
    found = printed(capsys)
    assert found["vqa_accuracy"] == pytest.approx(found["vqa_score"], abs=1e-12)
    assert main(evaluate(data, finished, "--split", "test", "--output", str(tmp_path))) == 0
    said = json.loads((tmp_path / "submission.json").read_text())
    asked = json.loads((data.parent / "raw" / "v2_OpenEnded_mscoco_test2015_questions.json").read_text())["questions"]
    assert [one["question_id"] for one in said] == [one["question_id"] for one in asked]
    assert {one["answer"] for one in said} <= set(json.loads((data / "vqav2_answers.json").read_text()))


def test_a_run_that_was_stopped_ends_with_the_same_weights(finished, data, checkpoint, tmp_path):
    assert main(finetune(data, checkpoint, tmp_path, run__stop_at=25)) == 0
    assert main([*finetune(data, checkpoint, tmp_path), "--resume"]) == 0
    whole, halves = (load_checkpoint(folder / "checkpoints" / "latest.pt") for folder in (finished, tmp_path))
    assert whole["step"] == halves["step"]
    for name, weight in whole["model"].items():
        assert torch.equal(weight, halves["model"][name]), name
    assert (finished / "results.json").read_text() == (tmp_path / "results.json").read_text()


def test_refusals_name_what_came_and_what_was_expected(finished, data, checkpoint, tmp_path, capsys):
    def refused(arguments):
        assert main(arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    line = refused(finetune(data, checkpoint, tmp_path / "a", model__width=128))
    assert f"model.width: got 128, the checkpoint {checkpoint} has 64" in line
    line = refused(finetune(data, checkpoint, tmp_path / "a", data__val_tables="[vqav2_dev]"))
    assert "vqav2_dev.arrow: no such table" in line and "vqav2_val" in line
    line = refused(finetune(data, checkpoint, tmp_path / "a", data__val_tables="[vqav2_test]"))
    assert "vqav2_test have no answers" in line
    line = refused(finetune(data, checkpoint, tmp_path / "a", task__global_batch=48))
    assert "task.global_batch: got 48, expected a multiple of 32" in line
    assert not (tmp_path / "a").exists()
    line = refused(finetune(data, tmp_path, tmp_path / "a"))
    assert f"--checkpoint: {tmp_path} has no config.json" in line
    line = refused(evaluate(data, checkpoint))
    assert "has no head 'vqa' (it has itm, mlm, itc)" in line
    line = refused(evaluate(data, finished, "--split", "test"))
    assert "--split: test has no answers to score" in line and "--output" in line
    line = refused(evaluate(data, finished, "--split", "dev"))
    assert "--split: got 'dev', expected one of train, val" in line


def test_an_answer_table_of_another_size_is_refused(finished, data, tmp_path, capsys):
    for file in data.glob("*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    answers = json.loads((data / "vqav2_answers.json").read_text())
    (tmp_path / "vqav2_answers.json").write_text(json.dumps([*answers, "purple"]))
    assert main(evaluate(tmp_path, finished)) == 2
    assert f"answers by {len(answers)} classes, and vqav2_answers.json of {tmp_path} has {len(answers) + 1}" in (
        capsys.readouterr().err
    )
    (tmp_path / "vqav2_answers.json").write_text(json.dumps(answers[::-1]))
    assert main(evaluate(tmp_path, finished)) == 2
    assert "other answers than that of" in capsys.readouterr().err
