"""VQAv2: a question on a picture, answered by one of the answers that are given most often.

Recipe, head and loss are those of METER and SCL: binary cross-entropy on soft scores, summed over the answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor

from sclkern.data.files import DataFolder
from sclkern.data.roots import resolve_root
from sclkern.errors import UserError
from sclkern.io import write_atomically
from sclkern.models.config import SCLConfig
from sclkern.objectives.downstream import visual_question_answering
from sclkern.step.dropout import BatchKeys
from sclkern.tasks.model import TaskModel
from sclkern.tasks.tables import QuestionTable
from sclkern.tasks.task import Evaluator, Outcome, Recipes, Sample, Task, register_task
from sclkern.tasks.vqa import vqa_accuracy

# Beside the tables, and beside a fine-tuned model.
ANSWERS = "vqav2_answers.json"

SPLITS = {
    "train": ("vqav2_train",),
    "val": ("vqav2_val",),
    "rest_val": ("vqav2_rest_val",),
    "test": ("vqav2_test",),
    "test-dev": ("vqav2_test-dev",),
}
_OPTIMIZER = {"learning_rate": 5e-6, "head_factor": 50.0, "fusion_factor": 10.0, "warmup": 0.1}
_DATA = {"transform": "clip_randaug"}
_TASK = {"epochs": 10.0, "global_batch": 512}
RECIPES: Recipes = {
    "default": {
        "data": {**_DATA, "train_tables": ["vqav2_train"], "val_tables": ["vqav2_val"]},
        "optimizer": _OPTIMIZER,
        "run": {"output_dir": "runs/vqav2"},
        "task": _TASK,
    },
    # Of validation all but 1,000 pictures are trained on, which leaves those to select by.
    "published": {
        "model": {"image_size": 384},
        "data": {
            **_DATA,
            "train_tables": ["vqav2_train", "vqav2_trainable_val"],
            "val_tables": ["vqav2_rest_val"],
            "decoding": "published",
        },
        "optimizer": {**_OPTIMIZER, "no_decay": "published"},
        "run": {"output_dir": "runs/vqav2_published"},
        "task": _TASK,
    },
}


class VqaModel(TaskModel):
    """Answers questions by the head ``vqa``."""

    loss_name = "vqa"

    def loss(self, batch: Mapping[str, Any], keys: BatchKeys | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Binary cross-entropy on the soft scores ``targets`` (B, answers)."""
        logits = self._logits(batch, keys)
        with torch.no_grad():
            score = batch["targets"].gather(1, logits.argmax(1, keepdim=True)).mean()
        return visual_question_answering(logits, batch["targets"]), {"vqa_score": score}

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """The number of the best answer to each question, (B,) int64."""
        return self._logits(batch).argmax(1)

    def _logits(self, batch: Mapping[str, Any], keys: BatchKeys | None = None) -> Tensor:
        texts = self.encode_texts(batch["text_ids"], batch["text_mask"], keys)
        return self.scores(self.vqa_head, self.fuse(texts, self.encode_image(batch["image"]), keys))


class VqaTable(QuestionTable):
    """Questions with soft answers.

    Args:
        root: as in ``QuestionTable``; it has the answer table.
        tables: as in ``QuestionTable``.

    Attributes:
        answers: the classes.
        answered: whether the questions have answers, as all but those of a test do.

    Raises:
        UserError: as ``QuestionTable``; there is no answer table, or the questions' answers are of another.
    """

    answers: list[str]
    answered: bool

    def __init__(self, root: str | Path, tables: Sequence[str]) -> None:
        columns = ("question_id", "answer_labels", "answer_scores")
        super().__init__(root, tables, columns=columns, set="vqav2")
        self.answers = _read_answers(DataFolder(resolve_root(root)))
        last = [pc.max(batch.column("answer_labels").flatten().flatten()).as_py() for batch in self._batches]
        highest = max((one for one in last if one is not None), default=-1)
        self.answered = highest >= 0
        if highest >= len(self.answers):
            raise UserError(
                f"{self.names}: has the label {highest}, expected 0 to {len(self.answers) - 1} of the "
                f"{len(self.answers)} answers of {ANSWERS}; convert the set again, with its answer table"
            )

    def question_ids(self) -> list[int]:
        """The id of each question, in the order of the samples."""
        return [int(one) for batch in self._batches for one in batch.column("question_id").flatten().to_pylist()]

    def scores(self, sample: int) -> dict[int, float]:
        """The soft score of each class that has one."""
        labels, scores = self.item("answer_labels", sample), self.item("answer_scores", sample)
        return dict(zip(labels or (), scores or (), strict=True))


@register_task
class Vqav2(Task):
    """Visual question answering."""

    name = "vqav2"
    title = "visual question answering (VQAv2)"
    model = VqaModel
    heads = ("vqa",)
    splits = SPLITS
    metric = "vqa_score"
    recipes = RECIPES

    def open(self, root: str | Path, tables: Sequence[str]) -> VqaTable:
        """Open tables of questions."""
        return VqaTable(root, tables)

    def sample(self, source: VqaTable, number: int) -> Sample:
        """A picture and a question; the target is the soft score of each answer."""
        return Sample(source.images_of(number), (source.text(number),), source.scores(number))

    def collate(self, source: VqaTable, targets: list[dict[int, float]]) -> dict[str, Tensor]:
        """``targets`` (B, answers) float32."""
        dense = torch.zeros(len(targets), len(source.answers))
        for row, scores in enumerate(targets):
            for label, score in scores.items():
                dense[row, label] = score
        return {"targets": dense}

    def measure(self, source: VqaTable, predictions: Tensor) -> Outcome:
        """``vqa_score``, the mean soft score of the answers, where there are answers; and the submission."""
        values: dict[str, float] = {}
        if source.answered:
            scores = [source.scores(sample).get(answer, 0.0) for sample, answer in enumerate(predictions.tolist())]
            values["vqa_score"] = sum(scores) / len(scores)
        submission = [
            {"question_id": question, "answer": source.answers[answer]}
            for question, answer in zip(source.question_ids(), predictions.tolist(), strict=True)
        ]
        return Outcome(values, submission)

    def evaluate(
        self, source: VqaTable, model: TaskModel, evaluator: Evaluator, *, annotations: Path | None = None
    ) -> Outcome:
        """As ``Task.evaluate``; with annotations also ``vqa_accuracy``, the official one of every annotated question.

        A question that a conversion left out, because none of its answers is a class, counts as answered wrongly.
        """
        outcome = self.measure(source, evaluator.predict(model, source))
        if annotations is None:
            return outcome
        said = {one["question_id"]: one["answer"] for one in outcome.submission}
        try:
            given = json.loads(annotations.read_text(encoding="utf-8"))["annotations"]
            asked = {int(one["question_id"]) for one in given}
            if not asked & said.keys():
                raise ValueError("has none of the questions of the tables")
            accuracy = vqa_accuracy({question: said.get(question, "") for question in asked}, given)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--annotations: {annotations} ({error}), expected the annotations of the split as they are "
                "distributed, such as v2_mscoco_val2014_annotations.json"
            ) from error
        counts = {"annotated": len(asked), "answered": len(asked & said.keys())}
        return Outcome({**outcome.values, "vqa_accuracy": accuracy, **counts}, outcome.submission)

    def answered(self, source: VqaTable) -> bool:
        """Whether the questions have answers."""
        return source.answered

    def sizes(self, source: VqaTable) -> dict[str, int]:
        """As many classes as the answer table has."""
        return {"vqa_answers": len(source.answers)}

    def check_model(self, source: VqaTable, folder: Path, config: SCLConfig) -> None:
        """The answer table of the model must be that of the data."""
        if len(source.answers) != config.vqa_answers:
            raise UserError(
                f"{folder}: answers by {config.vqa_answers} classes, and {ANSWERS} of {source.root} has "
                f"{len(source.answers)}; take data converted from the same annotations, or the pre-trained model"
            )
        if (folder / ANSWERS).is_file() and _read_answers(DataFolder(folder)) != source.answers:
            raise UserError(
                f"{folder}: its {ANSWERS} has other answers than that of {source.root}, or in another order; take data "
                "converted from the same annotations"
            )

    def save(self, source: VqaTable, folder: Path) -> None:
        """Write the answer table."""
        text = json.dumps(source.answers, ensure_ascii=False, indent=0) + "\n"
        write_atomically(folder / ANSWERS, lambda path: path.write_text(text, encoding="utf-8"))


def _read_answers(folder: DataFolder) -> list[str]:
    if folder.info(ANSWERS) is None:
        raise UserError(
            f"{folder.shown(ANSWERS)}: no such file, expected the answers that the labels count; sclkern data convert "
            "vqav2 writes it beside the tables"
        )
    try:
        answers = json.loads(folder.read(ANSWERS))
    except ValueError as error:
        raise UserError(f"{folder.shown(ANSWERS)}: no JSON ({error}); convert the set again") from error
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
        raise UserError(f"{folder.shown(ANSWERS)}: expected a list of texts; convert the set again")
    return answers
