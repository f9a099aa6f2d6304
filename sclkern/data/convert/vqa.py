"""VQAv2: pictures of COCO with questions and soft answers."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa

from sclkern.data.answers import kept_answers, soft_scores
from sclkern.data.convert.annotations import find, read_json, records
from sclkern.data.convert.plan import STRINGS, Listing, Options, Plan, Row, Table
from sclkern.data.files import DataFolder
from sclkern.errors import UserError

_FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test2015"}
_QUESTIONS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
_COLUMNS = pa.schema(
    [
        ("questions", STRINGS),
        ("answers", pa.list_(STRINGS)),
        ("answer_labels", pa.list_(pa.list_(pa.int64()))),
        ("answer_scores", pa.list_(pa.list_(pa.float64()))),
        ("image_id", pa.int64()),
        ("question_id", pa.list_(pa.int64())),
        ("split", pa.string()),
    ]
)
PUBLISHED_ANSWERS = 3129


def plan_vqav2(source: DataFolder, options: Options) -> Plan:
    """VQAv2: train2014/, val2014/, test2015/, four files of questions and two of annotations."""
    plan, listing = Plan(), Listing(source)
    asked = {split: _read(source, f"v2_OpenEnded_mscoco_{name}_questions.json", "questions", "questions",
                          ("image_id", "question", "question_id")) for split, name in _QUESTIONS.items()}  # fmt: skip
    given = {split: _read(source, f"v2_mscoco_{_QUESTIONS[split]}_annotations.json", "annotations", "annotations",
                          ("question_id", "multiple_choice_answer", "answers"))
             for split in ("train", "val")}  # fmt: skip
    classes = kept_answers(one["multiple_choice_answer"] for split in given for one in given[split])
    numbers = {answer: number for number, answer in enumerate(classes)}
    plan.count("kept answers", len(classes))
    if len(classes) != PUBLISHED_ANSWERS:
        plan.notes.append(f"{len(classes):,} answers are kept, {PUBLISHED_ANSWERS:,} as published")
    plan.extra["vqav2_answers.json"] = classes
    rows = {split: _rows(split, asked[split], given.get(split), classes, numbers, listing, options, plan)
            for split in asked}  # fmt: skip
    drawn = list(rows["val"])
    if not 0 < options.rest_val < len(drawn):
        raise UserError(
            f"--rest-val: got {options.rest_val}, expected less than the {len(drawn)} pictures of validation, and more "
            "than 0"
        )
    random.Random(options.seed).shuffle(drawn)
    plan.notes.append(f"rest_val: {options.rest_val:,} pictures of validation, drawn with seed {options.seed}")
    rows["trainable_val"], rows["rest_val"] = drawn[: -options.rest_val], drawn[-options.rest_val :]
    plan.tables = [Table(f"vqav2_{split}", _COLUMNS, of_split) for split, of_split in rows.items()]
    return plan


def _read(source: DataFolder, name: str, key: str, what: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    find(source, (name,), f"{what} of VQAv2")
    return records(source, name, read_json(source, name, dict, f"an object with {key}").get(key), keys)


def _rows(
    split: str,
    asked: list[dict[str, Any]],
    given: list[dict[str, Any]] | None,
    classes: list[str],
    numbers: dict[str, int],
    listing: Listing,
    options: Options,
    plan: Plan,
) -> list[Row]:
    """The questions of each picture, pictures in order of their first question."""
    annotations = {one["question_id"]: one for one in given or ()}
    pictures: dict[int, tuple[list[Any], ...]] = {}
    for question in asked:
        plan.count(f"questions of {split}")
        labels: list[int] = []
        scores: list[float] = []
        if given is not None:
            annotation = annotations.get(question["question_id"])
            if annotation is None:
                plan.dropped.add(f"questions of {split} without annotation", str(question["question_id"]))
                continue
            texts = [one["answer"] for one in annotation["answers"]]
            soft = soft_scores(texts, normalize=options.answers != "published")
            labels = [numbers[text] for text in soft if text in numbers]
            scores = [score for text, score in soft.items() if text in numbers]
            if not labels:
                plan.dropped.add(f"questions of {split} without a kept answer", str(question["question_id"]))
                continue
        texts_of, answers_of, labels_of, scores_of, ids = pictures.setdefault(
            int(question["image_id"]), ([], [], [], [], [])
        )
        texts_of.append(question["question"])
        ids.append(int(question["question_id"]))
        if given is not None:
            answers_of.append([classes[label] for label in labels])
            labels_of.append(labels)
            scores_of.append(scores)
    folder, rows = _FOLDERS[split], []
    for picture, (texts_of, answers_of, labels_of, scores_of, ids) in pictures.items():
        file = f"{folder}/COCO_{folder}_{picture:012}.jpg"
        if listing.has(file):
            rows.append(Row((file,), (texts_of, answers_of, labels_of, scores_of, picture, ids, split)))
        else:
            plan.missing.add(f"pictures of {folder}/", file)
    return rows
