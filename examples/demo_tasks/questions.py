"""easy-vqa in the published layout of VQAv2: drawings of one shape, with questions on its kind and colour."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.demo_tasks.commands import evaluate, finetune, pretrain
from examples.demo_tasks.figures import Figure
from sclkern.data.convert import convert
from sclkern.data.convert.plan import Options
from sclkern.data.sources.arrow import write_pairs
from sclkern.tasks.vqa import vqa_accuracy

TASK = "easy-vqa, test questions"
# Every so many training pictures one is held out, which the best model is chosen by.
HOLD_OUT = 8
# As in VQAv2.
ANNOTATORS = 10
SHAPES = ("circle", "rectangle", "triangle")
# 32 pixels are enough to tell the shapes, at a quarter of the tokens of 64.
_SIZES = {"model.image_size": 32, "model.max_text_len": 24}
# One question of eight asks for a shape, and the demo's model does not tell shapes apart: the contrast with captions of
# the training pictures, such as "blue circle", teaches that in less time than the questions do.
CONTRAST_KEYS: dict[str, Any] = {
    **_SIZES,
    "evaluation.rerank": 0,
    "objectives.recipe": "[itc]",
    "run.max_steps": 1000,
    "run.val_every": 250,
}
KEYS: dict[str, Any] = {
    **_SIZES,
    "optimizer.betas": "[0.9, 0.999]",
    "optimizer.fusion_factor": 1.0,
    "optimizer.head_factor": 3.0,
    "optimizer.learning_rate": 5e-4,
    "run.batch_size": 128,
    "run.max_steps": 600,
    "run.val_every": 200,
}


class Question(NamedTuple):
    """A question on a picture.

    Attributes:
        text: of the question.
        answer: that is right.
        picture: number of the picture in its folder.
    """

    text: str
    answer: str
    picture: int


def read() -> dict[str, tuple[list[Question], Mapping[int, str]]]:
    """Read the installed package easy-vqa.

    Returns:
        Of "train", "val" (held out of training) and "test": the questions, and the file of each picture by its number.
    """
    import easy_vqa

    of_training = [Question(*one) for one in zip(*easy_vqa.get_train_questions(), strict=True)]
    pictures, test = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    train = [one for one in of_training if one.picture % HOLD_OUT]
    val = [one for one in of_training if not one.picture % HOLD_OUT]
    asked = [Question(*one) for one in zip(*easy_vqa.get_test_questions(), strict=True)]
    return {"train": (train, pictures), "val": (val, pictures), "test": (asked, test)}


def write(folder: Path) -> Path:
    """Write easy-vqa as VQAv2 is published, and convert it.

    Args:
        folder: where ``raw/`` and ``tables/`` are written.

    Returns:
        The folder of the tables.
    """
    raw = folder / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    first = 0
    for split, (asked, pictures) in read().items():
        name = {"train": "train2014", "val": "val2014", "test": "test2015"}[split]
        (raw / name).mkdir(parents=True)
        for picture in sorted({one.picture for one in asked}):
            shutil.copy(pictures[picture], raw / name / f"COCO_{name}_{picture:012}.jpg")
        keys = [{"image_id": one.picture, "question_id": first + place} for place, one in enumerate(asked)]
        questions = [{**key, "question": one.text} for key, one in zip(keys, asked, strict=True)]
        _write(raw / f"v2_OpenEnded_mscoco_{name}_questions.json", {"questions": questions})
        if split == "test":
            _write(raw / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})
        else:
            answers = [_annotation(key, one.answer) for key, one in zip(keys, asked, strict=True)]
            _write(raw / f"v2_mscoco_{name}_annotations.json", {"annotations": answers})
        first += len(asked)
    convert("vqav2", raw, folder / "tables", Options(rest_val=1), workers=1)
    return folder / "tables"


def write_captions(folder: Path) -> Path:
    """Write the training pictures whose shape and colour questions of training tell, with captions of both.

    Args:
        folder: of the tables ``train`` and ``val``, the latter of pictures held out.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        asked, pictures = read()[split]
        said: defaultdict[int, set[str]] = defaultdict(set)
        for one in asked:
            said[one.picture] |= {one.answer} - {"yes", "no"}
        captions = {
            picture: " ".join(sorted(answers, key=lambda answer: answer in SHAPES))
            for picture, answers in sorted(said.items())
            if len(answers) == 2
        }
        # Pictures of one caption are no negatives of one another.
        rows = (
            {"image": Path(pictures[picture]).read_bytes(), "caption": [caption], "image_id": caption}
            for picture, caption in captions.items()
        )
        write_pairs(folder / f"{split}.arrow", rows)
    return folder


def test_accuracy(submission: Path) -> float:
    """The official accuracy of a submission on the test questions.

    Args:
        submission: ``submission.json`` of ``sclkern evaluate vqav2 --split test``.

    Returns:
        In [0, 1].
    """
    splits = read()
    first = len(splits["train"][0]) + len(splits["val"][0])
    annotations = [
        _annotation({"question_id": first + place}, one.answer) for place, one in enumerate(splits["test"][0])
    ]
    said = {one["question_id"]: one["answer"] for one in json.loads(submission.read_text())}
    return vqa_accuracy(said, annotations)


def question_only(split: str) -> float:
    """The accuracy of answering each question as it is answered most often in training, whatever the picture.

    No model that does not see pictures is right more often on questions that are distributed as in training.

    Args:
        split: "val" or "test".

    Returns:
        In [0, 1].
    """
    splits = read()
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for one in splits["train"][0]:
        counts[one.text][one.answer] += 1
    every = Counter(one.answer for one in splits["train"][0]).most_common(1)[0][0]
    best = {text: answers.most_common(1)[0][0] for text, answers in counts.items()}
    asked: Sequence[Question] = splits[split][0]
    return sum(best.get(one.text, every) == one.answer for one in asked) / len(asked)


def run(checkpoint: Path, folder: Path, steps: int | None = None) -> list[Figure]:
    """Go on with pre-training on captions of the training pictures, fine-tune, and answer the test questions.

    Args:
        checkpoint: folder of the pre-trained model or its run.
        folder: of everything that is written.
        steps: of fine-tuning; None takes those of ``KEYS``.

    Returns:
        The accuracy, beside that without pictures.
    """
    tables, steps = write(folder), steps or KEYS["run.max_steps"]
    keys = {**KEYS, "run.max_steps": steps}
    contrasted = pretrain(checkpoint, write_captions(folder / "captions"), folder / "contrast", CONTRAST_KEYS)
    tuned = finetune("vqav2", contrasted, tables, folder / f"fine_tuned_{steps}", keys)
    answers = folder / f"answers_{steps}"
    evaluate("vqav2", tuned, tables, answers)
    accuracy = 100 * test_accuracy(answers / "submission.json")
    model, baseline = f"fine-tuned, {steps} steps", "question alone"
    return [Figure(TASK, model, "VQA accuracy", accuracy, baseline, 100 * question_only("test"))]


def _annotation(key: Mapping[str, int], answer: str) -> dict[str, Any]:
    given = [{"answer": answer, "answer_id": number} for number in range(1, ANNOTATORS + 1)]
    return {**key, "multiple_choice_answer": answer, "answers": given}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
