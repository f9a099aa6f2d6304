"""VQAv2 and NLVR2."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from look_alikes.tree import Tree, caption, write, write_picture

# Question and answer of each kind; "rare" is given too seldom to be kept.
_ASKED = (("Is it red?", "yes"), ("How many?", "two"), ("What is it?", "the t-shirt"), ("Is it?", "no"))
_SPLITS = (("train", "train2014", 12), ("val", "val2014", 10), ("test", "test2015", 4))


def vqav2(root: Path, *, defects: Collection[str] = ()) -> Tree:
    """VQAv2: three folders of pictures, four files of questions and two of annotations.

    Every picture has four questions. Defects: "unanswered" (a question of training without a kept answer), "missing" (a
    picture of training), "without_annotation" (a question of validation).
    """
    tree, number = Tree(root), 0
    asked: dict[str, list[dict[str, Any]]] = defaultdict(list)
    answered: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for split, folder, count in _SPLITS:
        for index in range(count):
            file = f"{folder}/COCO_{folder}_{number:012}.jpg"
            defect = "missing" if "missing" in defects and split == "train" and index == 3 else ""
            if defect:
                tree.defective[defect] = file
            write_picture(root / file, number, defect=defect)
            kept = []
            for place, (question, answer) in enumerate(_ASKED):
                key = 10 * number + place
                asked[split].append({"image_id": number, "question": f"{question} {number}", "question_id": key})
                if split == "test":
                    kept.append((f"{question} {number}", key))
                    continue
                rare = "unanswered" in defects and split == "train" and index == 1 and place == 2
                common = "rare" if rare else answer
                if rare:
                    tree.defective["unanswered"] = str(key)
                texts = [common] * (10 - number % 4) + [f"odd {number}"] * (number % 4)
                entry = {"question_id": key, "image_id": number, "multiple_choice_answer": common}
                entry["answers"] = [{"answer": text, "answer_id": i + 1} for i, text in enumerate(texts)]
                if "without_annotation" in defects and split == "val" and index == 0 and place == 0:
                    tree.defective["without_annotation"] = str(key)
                else:
                    answered[split].append(entry)
                    if not rare:
                        kept.append((f"{question} {number}", key))
            if not defect:
                questions, keys = [question for question, _ in kept], [key for _, key in kept]
                tree.row(f"vqav2_{split}", file=file, questions=questions, question_id=keys, image_id=number)
            number += 1
    names = {"train": "train2014", "val": "val2014", "test": "test2015"}
    for split, questions in asked.items():
        write(root / f"v2_OpenEnded_mscoco_{names[split]}_questions.json", {"questions": questions})
    write(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked["test"][:8]})
    tree.rows["vqav2_test-dev"] = tree.rows["vqav2_test"][:2]
    for split in ("train", "val"):
        write(root / f"v2_mscoco_{names[split]}_annotations.json", {"annotations": answered[split]})
    return tree


def nlvr2(root: Path, *, defects: Collection[str] = ()) -> Tree:
    """NLVR2: nlvr2/data/*.json as lines, images/train/<directory>/, dev/, test1/.

    Defects: "not_png" (a JPEG that is called .png), "missing" (a picture of training), "truncated" (of dev).
    """
    tree, number = Tree(root), 0
    lines: dict[str, list[str]] = defaultdict(list)
    for split, count in (("train", 8), ("dev", 6), ("test1", 6)):
        for index in range(count):
            identifier = f"{split}-{number}-{index % 2}"
            folder = f"images/train/{number % 3}" if split == "train" else split
            files = [f"{folder}/{identifier}-img{side}.png" for side in (0, 1)]
            defect = ""
            for name, place in {"not_png": ("train", 1), "missing": ("train", 2), "truncated": ("dev", 1)}.items():
                if name in defects and place == (split, index):
                    defect = name
                    tree.defective[name] = files[1]
            for side, file in enumerate(files):
                at = {"not_png": "jpeg"}.get(defect, defect) if side else ""
                write_picture(root / file, 2 * number + side, defect=at)
            sentences = [f"There is {caption(2 * number)}.", f"Both show {caption(2 * number + 1)}."]
            for place, sentence in enumerate(sentences):
                record = {
                    "sentence": sentence,
                    "identifier": f"{identifier}-{place}",
                    "label": ("True", "False")[place],
                }
                if split == "train":
                    record["directory"] = number % 3
                lines[f"nlvr2/data/{split}.json"].append(json.dumps(record))
                if split != "train":
                    kind = "balanced" if index % 2 else "unbalanced"
                    lines[f"nlvr2/data/{kind}/{kind}_{split}.json"].append(json.dumps(record))
            if defect in ("", "not_png"):
                row = {"files": files, "questions": sentences, "answers": ["True", "False"], "identifier": identifier}
                tree.row(f"nlvr2_{split}", **row)
                if split != "train":
                    tree.row(f"nlvr2_{'balanced' if index % 2 else 'unbalanced'}_{split}", **row)
            number += 1
    for name, content in lines.items():
        write(root / name, "\n".join(content) + "\n")
    return tree
