"""Every task end to end: it learns, it resumes, evaluation repeats its metric, and what cannot work is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import answerable
from sclkern.cli import main
from sclkern.cli.parser import TASKS as NAMES
from sclkern.tasks.config import TaskConfig
from sclkern.tasks.registered import TASKS
from sclkern.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# By task: its run, the metric, and what that must reach, its chance and 20 points. Of VQA the best constant answers to
# both questions are right for 25 and 75 % of the pictures, of NLVR2 either answer for half of the sentences; a query of
# the retrievals has 8 candidates.
RETRIEVAL = {"task__global_batch": 16, "run__batch_size": 16}
CLIPS = {**RETRIEVAL, "data__num_frames": 2, "task__val_epochs": "null"}
CASES = {
    "vqav2": ({"task__epochs": 2}, "vqa_score", 0.5 + 0.2),
    "nlvr2": ({"task__epochs": 4}, "accuracy", 0.5 + 0.2),
    "coco": ({**RETRIEVAL, "task__epochs": 1.5}, "rank_text_to_image_r1", 1 / 8 + 0.2),
    "flickr30k": ({**RETRIEVAL, "task__epochs": 1.5}, "rank_text_to_image_r1", 1 / 8 + 0.2),
    "lsmdc": ({**CLIPS, "task__epochs": 1.25}, "rank_text_to_image_r1", 1 / 8 + 0.2),
    "msrvtt": ({**CLIPS, "task__epochs": 0.6}, "rank_text_to_image_r1", 1 / 8 + 0.2),
}


class Work:
    """The data of a task, a checkpoint, and the folder of a run that has ended."""

    def __init__(self, task, root):
        self.task, self.root = task, root
        self.data, self.checkpoint = getattr(answerable, task)(root), answerable.checkpoint(root / "checkpoint")
        self.run = root / "run"

    def finetune(self, folder, *arguments, checkpoint=None, **changes):
        changes = {"data__root": self.data, "run__output_dir": folder, **CASES[self.task][0], **changes}
        start = ["finetune", self.task, "--checkpoint", str(checkpoint or self.checkpoint)]
        return main([*start, *answerable.overrides(**changes), *arguments])

    def evaluate(self, *arguments, checkpoint=None, data=None):
        start = ["evaluate", self.task, "--checkpoint", str(checkpoint or self.run), "--data", str(data or self.data)]
        return main([*start, "run.device=cpu", *map(str, arguments)])

    @property
    def results(self):
        return json.loads((self.run / "results.json").read_text())


def finished(task, root):
    work = Work(task, root)
    assert work.finetune(work.run) == 0
    return work


@pytest.fixture(scope="module", params=CASES)
def work(request, tmp_path_factory):
    return finished(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def refused(capsys):
    def refused(status):
        assert status == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def printed(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_beats_chance_and_evaluation_repeats_the_metric_to_the_digit(work, tmp_path, capsys):
    _, metric, least = CASES[work.task]
    task = TASKS[work.task]
    assert task.open(work.data, task.recipes["default"]["data"]["train_tables"]).num_samples >= 500
    assert work.results["values"][metric] >= least
    capsys.readouterr()
    assert work.evaluate("--output", tmp_path) == 0
    assert printed(capsys) == work.results["values"]
    # Also what was measured, by which model.
    found = json.loads((tmp_path / "results.json").read_text())
    assert {**found, "step": work.results["step"]} == work.results and found["recipe"] == "default"


def test_a_run_that_was_stopped_ends_with_the_same_weights(work, tmp_path):
    short = {"task__epochs": "null", "task__val_epochs": "null", "run__max_steps": 6, "run__val_every": 4}
    assert work.finetune(tmp_path / "whole", **short) == 0
    assert work.finetune(tmp_path / "halves", **short, run__stop_at=3) == 0
    assert work.finetune(tmp_path / "halves", "--resume", **short) == 0
    whole, halves = (
        load_checkpoint(tmp_path / name / "checkpoints" / "latest.pt")["model"] for name in ("whole", "halves")
    )
    for name, weight in whole.items():
        assert torch.equal(weight, halves[name]), name
    found = [(tmp_path / name / "results.json").read_text() for name in ("whole", "halves")]
    assert found[0] == found[1]


def test_refusals_name_what_came_and_what_was_expected(work, tmp_path, refused):
    folder, head = tmp_path / "a", TASKS[work.task].heads[0]
    line = refused(work.finetune(folder, model__width=128))
    assert f"model.width: got 128, the checkpoint {work.checkpoint} has 64" in line
    line = refused(work.finetune(folder, data__train_split="train"))
    assert "data.train_split: got 'train', but a task reads every row" in line
    line = refused(work.finetune(folder, data__val_tables="[other]"))
    assert "other.arrow" in line and TASKS[work.task].splits["train"][0] in line
    line = refused(work.finetune(folder, task__global_batch=40))
    assert "task.global_batch: got 40, expected a multiple of " in line
    line = refused(work.finetune(folder, checkpoint=tmp_path))
    assert f"--checkpoint: {tmp_path} has no config.json" in line
    assert not folder.exists()
    bare = answerable.checkpoint(tmp_path / "bare", heads=("mlm",))
    assert f"has no head {head!r} (it has mlm)" in refused(work.evaluate(checkpoint=bare))
    line = refused(work.evaluate("--split", "other"))
    assert "--split: got 'other', expected one of train, " in line


def test_the_command_line_and_the_page_have_every_task_and_key():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    assert tuple(sorted(TASKS)) == NAMES
    assert all(f"`{name}`" in page for name in TASKS)
    keys = {field.name for field in dataclasses.fields(TaskConfig)} - {"name", "recipe"}
    assert set(re.findall(r"^\| `task\.(\w+)` \|", page, re.M)) == keys


class TestVqav2:
    @pytest.fixture(scope="class")
    def work(self, tmp_path_factory):
        return finished("vqav2", tmp_path_factory.mktemp("vqav2"))

    def test_the_official_score_and_the_submission(self, work, tmp_path, capsys):
        annotations = work.root / "raw" / "v2_mscoco_val2014_annotations.json"
        assert work.evaluate("--annotations", annotations) == 0
        found = printed(capsys)
        assert found["vqa_accuracy"] == pytest.approx(found["vqa_score"], abs=1e-12)
        assert work.evaluate("--split", "test", "--output", tmp_path) == 0
        assert f"written: {tmp_path / 'submission.json'}, 16 answers" in capsys.readouterr().out
        said = json.loads((tmp_path / "submission.json").read_text())
        asked = json.loads((work.root / "raw" / "v2_OpenEnded_mscoco_test2015_questions.json").read_text())["questions"]
        assert [one["question_id"] for one in said] == [one["question_id"] for one in asked]
        assert {one["answer"] for one in said} <= set(json.loads((work.data / "vqav2_answers.json").read_text()))

    def test_a_test_split_has_no_score(self, work, tmp_path, refused):
        line = refused(work.evaluate("--split", "test"))
        assert "--split: test has no answers to score" in line and "--output" in line
        line = refused(work.finetune(tmp_path / "a", data__val_tables="[vqav2_test]"))
        assert "vqav2_test have no answers" in line

    def test_an_answer_table_of_another_size_is_refused(self, work, tmp_path, refused):
        for file in work.data.glob("*"):
            if file.is_file():
                (tmp_path / file.name).write_bytes(file.read_bytes())
        answers, table = json.loads((work.data / "vqav2_answers.json").read_text()), tmp_path / "vqav2_answers.json"
        table.write_text(json.dumps([*answers, "purple"]))
        line = refused(work.evaluate(data=tmp_path))
        many = len(answers)
        assert f"answers by {many} classes, and vqav2_answers.json of {tmp_path} has {many + 1}" in line
        table.write_text(json.dumps(answers[::-1]))
        assert "other answers than that of" in refused(work.evaluate(data=tmp_path))

    def test_a_checkpoint_of_a_run_is_exported_as_any_other(self, work, tmp_path):
        best = work.run / "checkpoints" / "best.pt"
        assert main(["export", str(best), "--output", str(tmp_path / "model")]) == 0
        folders = (work.run / "model", tmp_path / "model")
        written, exported = (load_file(folder / "model.safetensors") for folder in folders)
        assert all(torch.equal(value, exported[name]) for name, value in written.items())


class TestRetrieval:
    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory):
        return answerable.flickr30k(tmp_path_factory.mktemp("flickr30k"), 32)

    def test_a_pre_trained_model_is_evaluated_without_fine_tuning(self, data, tmp_path, capsys):
        checkpoint = answerable.checkpoint(tmp_path / "checkpoint")
        arguments = ["evaluate", "flickr30k", "--checkpoint", str(checkpoint), "--data", str(data), "--split", "test"]
        assert main([*arguments, "run.device=cpu", "task.rerank=null", "--output", str(tmp_path / "out")]) == 0
        found = printed(capsys)
        assert json.loads((tmp_path / "out" / "results.json").read_text())["recipe"] == "zero-shot"
        assert found["chance_image_to_text_r1"] == found["chance_text_to_image_r1"] == 1 / 8
        assert 0 <= found["rank_image_to_text_r1"] <= 1

    def test_pictures_are_no_clips(self, data, tmp_path, refused):
        checkpoint = answerable.checkpoint(tmp_path / "checkpoint")
        changes = {"data__root": data, "data__train_tables": "[f30k_caption_karpathy_train]"}
        start = ["finetune", "lsmdc", "--checkpoint", str(checkpoint)]
        line = refused(main([*start, *answerable.overrides(**changes, run__output_dir=tmp_path / "a")]))
        assert "f30k_caption_karpathy_train: got pictures, expected clips" in line

    def test_too_few_captions_of_other_pictures_are_refused(self, data, tmp_path, refused):
        checkpoint = answerable.checkpoint(tmp_path / "checkpoint")
        changes = {"data__root": data, "data__train_tables": "[f30k_caption_karpathy_val]"}
        start = ["finetune", "flickr30k", "--checkpoint", str(checkpoint)]
        line = refused(main([*start, *answerable.overrides(**changes, run__output_dir=tmp_path / "a")]))
        assert "14 captions of other pictures than a picture's own, expected 30 or more" in line
