"""The official accuracy, against its definition on enumerated sets of annotators."""

import itertools
import re
from fractions import Fraction

import pytest

from sclkern.tasks.vqa import normalize_answer, soft_scores, vqa_accuracy


def entry(question, *answers):
    """As in the official file."""
    return {"question_id": question, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Yes.", "yes"),
        ("the  dog", "dog"),
        ("An", ""),
        ("a.b", "ab"),
        ("2.5", "2.5"),
        ("3.", "3"),
        ("None", "0"),
        ("TEN", "10"),
        ("eleven", "eleven"),
        ("t-shirt", "t shirt"),
        ("black - white", "black white"),
        ("black -white", "black white"),
        # A comma between digits joins every mark, others become a space.
        ("1,000", "1000"),
        ("1,000-2", "10002"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("don't", "don't"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        (" line\nbreak\tand tab ", "line break and tab"),
        ("it's", "it's"),
        ("its", "its"),
        ("a:b", "a:b"),
        ("." * 33, "."),
        ("", ""),
        ("\u0662,\u0663", "\u0662\u0663"),
    ],
)
def test_normalisation(given, expected):
    assert normalize_answer(given) == expected


def accuracy_by_definition(answer, given):
    """Leave one annotator out, in turn."""
    scores = [min(Fraction(1), Fraction(sum(x == answer for x in left), 3))
              for left in itertools.combinations(given, len(given) - 1)]  # fmt: skip
    return sum(scores) / len(scores)


@pytest.mark.parametrize("count", range(11))
def test_ten_annotators(count):
    given = ["cat"] * count + ["dog", "bird"] * 5
    expected = accuracy_by_definition("cat", given[:10])
    assert vqa_accuracy({1: "cat"}, [entry(1, *given[:10])]) == float(expected)
    assert soft_scores(given[:10]).get("cat", 0) == float(expected) == (0, 0.3, 0.6, 0.9, 1)[min(count, 4)]


@pytest.mark.parametrize("annotators", [2, 3, 5, 9])
def test_other_numbers_of_annotators(annotators):
    for count in range(annotators + 1):
        given = ["x"] * count + [f"y{i}" for i in range(annotators - count)]
        assert vqa_accuracy({1: "x"}, [entry(1, *given)]) == float(accuracy_by_definition("x", given))


def test_the_mean_over_questions_is_exact():
    annotations = {"annotations": [entry(i, *["yes"] * 3, *["no"] * 7) for i in range(10)]}
    answers = {i: "yes" for i in range(10)}
    # Ten times 0.9, added up one after another, is not 9 in floats.
    assert vqa_accuracy(answers, annotations) == 0.9


def test_equal_answers_are_compared_as_they_are():
    assert vqa_accuracy({1: "T-shirt"}, [entry(1, *["T-shirt"] * 10)]) == 1
    assert vqa_accuracy({1: "t shirt"}, [entry(1, *["T-shirt"] * 10)]) == 0
    assert vqa_accuracy({1: "t shirt"}, [entry(1, *["T-shirt"] * 9, "shirt")]) == 1
    # White space around an answer and line breaks do not count either way.
    assert vqa_accuracy({1: "red\ncar "}, [entry(1, *["red car"] * 9, " red car")]) == 1


def test_equal_after_normalising_is_not_equal_before():
    assert vqa_accuracy({1: "two"}, [entry(1, *["2"] * 5, *["Two"] * 5)]) == 1


def test_answers_may_be_strings_and_questions_in_any_order():
    annotations = [{"question_id": 2, "answers": ["a b"] * 10}, {"question_id": 1, "answers": ["c"] * 10}]
    assert vqa_accuracy({1: "c", 2: "x"}, annotations) == 0.5


def test_published_targets_take_answers_as_they_are():
    assert soft_scores(["T-shirt", "t shirt", "t shirt"]) == {"t shirt": 0.9}
    assert soft_scores(["T-shirt", "t shirt", "t shirt"], normalize=False) == {"T-shirt": 0.3, "t shirt": 0.6}


@pytest.mark.parametrize(
    ("answers", "annotations", "error", "message"),
    [
        ({}, [entry(7, "a", "b")], ValueError, "answers: got none for 1 of 1 annotated questions, such as 7"),
        ({1: "a", 9: "b"}, [entry(1, "a", "b")], ValueError, "answers: got 1 for questions that annotations lack"),
        ({1: 3}, [entry(1, "a", "b")], TypeError, "answers: got int for question 1, expected a string"),
        ({"1": "a"}, [entry(1, "a", "b")], TypeError, "answers: got the question '1', expected an integer"),
        ({1: "a"}, [entry(1, "a", "b")] * 2, ValueError, "annotations: got question 1 twice"),
        ({1: "a"}, [{"question_id": 1}], ValueError, "annotations: .* entry 0, expected 'question_id' and 'answers'"),
        ({1: "a"}, [{"question_id": 1, "answers": [None, "a"]}], ValueError, "annotations: .* answers of question 1"),
        ({1: "a"}, [entry(1, "a")], ValueError, "annotations: .* two annotators or more"),
        ({1: "a"}, {"questions": []}, ValueError, r"annotations: got keys \['questions'\], expected 'annotations'"),
        ({}, [], ValueError, "annotations: got none"),
    ],
)
def test_wrong_arguments_are_named(answers, annotations, error, message):
    with pytest.raises(error, match=message):
        vqa_accuracy(answers, annotations)


def test_messages_stay_short():
    with pytest.raises(ValueError, match=re.compile("^annotations.{,400}$")):
        vqa_accuracy({1: "a"}, [{"question_id": 1, "answers": [None] * 10000}])
