"""The official accuracy of VQAv2."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from sclkern.data.answers import normalize_answer, on_one_line, soft_scores

__all__ = ["normalize_answer", "soft_scores", "vqa_accuracy"]

# This many equal answers of others make an answer right.
_ENOUGH = 3


def vqa_accuracy(answers: Mapping[int, str], annotations: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> float:
    """Accuracy of the official evaluation, without its rounding to hundredths of a percent.

    An answer scores min(1, n / 3) against each set of annotators that leaves one of them out, n of whom gave it. Both
    sides are normalised, but only if the annotators' answers are not all equal.

    Args:
        answers: of the model, by question.
        annotations: what an annotations file holds, or its list: each has ``question_id`` and ``answers``, the latter
            with ``answer`` each (or a string each).

    Returns:
        The mean over questions, in [0, 1]; of exact fractions, rounded once.

    Raises:
        TypeError: an answer that is no string, or a question that is no integer.
        ValueError: an annotation lacks an entry or has fewer than two answers, a question is annotated twice; questions
            without an answer, or answers to other questions.
    """
    given = _answers_by_question(annotations)
    for question, answer in answers.items():
        if not isinstance(answer, str):
            raise TypeError(f"answers: got {type(answer).__name__} for question {question!r}, expected a string")
    asked = {_question(question, "answers"): answer for question, answer in answers.items()}
    if missing := given.keys() - asked.keys():
        raise ValueError(
            f"answers: got none for {len(missing)} of {len(given)} annotated questions, such as {min(missing)}; "
            "expected an answer to each: the official evaluation takes no other"
        )
    if unknown := asked.keys() - given.keys():
        raise ValueError(
            f"answers: got {len(unknown)} for questions that annotations lack, such as {min(unknown)}; expected "
            "annotations of the same split"
        )
    # Of few forms, so that the sum is exact and quick.
    forms = Counter(_matches(asked[question], of_annotators) for question, of_annotators in given.items())
    total = sum((count * _accuracy(*form) for form, count in forms.items()), Fraction(0))
    return float(total / len(given))


def _matches(answer: str, of_annotators: Sequence[str]) -> tuple[int, int]:
    """How many of how many annotators gave an answer."""
    answer, given = on_one_line(answer), [on_one_line(one) for one in of_annotators]
    if len(set(given)) > 1:
        answer, given = normalize_answer(answer), [normalize_answer(one) for one in given]
    return given.count(answer), len(given)


def _accuracy(matching: int, annotators: int) -> Fraction:
    with_him, without_him = (Fraction(min(n, _ENOUGH), _ENOUGH) for n in (matching, max(matching - 1, 0)))
    return (matching * without_him + (annotators - matching) * with_him) / annotators


def _answers_by_question(annotations: Any) -> dict[int, list[str]]:
    if isinstance(annotations, Mapping):
        if "annotations" not in annotations:
            raise ValueError(
                f"annotations: got keys {sorted(map(str, annotations))[:5]}, expected 'annotations', as in the "
                "official file, or the list that it holds"
            )
        annotations = annotations["annotations"]
    found: dict[int, list[str]] = {}
    for number, one in enumerate(annotations):
        if not isinstance(one, Mapping) or not {"question_id", "answers"} <= one.keys():
            shown = sorted(map(str, one)) if isinstance(one, Mapping) else type(one).__name__
            raise ValueError(f"annotations: got {shown} as entry {number}, expected 'question_id' and 'answers'")
        question = _question(one["question_id"], "annotations")
        texts = [text["answer"] if isinstance(text, Mapping) else text for text in one["answers"]]
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"annotations: got {texts!r:.80} as answers of question {question}, expected the strings of two "
                "annotators or more (ten in VQAv2)"
            )
        if question in found:
            raise ValueError(f"annotations: got question {question} twice, expected each once")
        found[question] = texts
    if not found:
        raise ValueError("annotations: got none, expected one or more")
    return found


def _question(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got the question {value!r}, expected an integer") from None
