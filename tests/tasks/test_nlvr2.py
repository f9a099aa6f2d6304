import pytest
import torch

from sclkern.tasks.nlvr2 import accuracy, consistency, sentence_of


def test_accuracy_and_consistency():
    identifiers = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-10-0-0"]
    labels, predictions = ["True", "False", "False", "True"], [True, True, False, True]
    assert accuracy(predictions, labels) == 0.75
    # The first sentence is wrong of one of its two pairs.
    assert consistency(predictions, labels, [sentence_of(one) for one in identifiers]) == 2 / 3


def test_sentences_are_told_apart_by_split_set_and_number():
    of = ["dev-1-0-0", "test1-1-0-0", "dev-10-0-0", "dev-1-0-10", "dev-1-3-0"]
    assert len({sentence_of(one) for one in of}) == 4
    with pytest.raises(ValueError, match=r"identifier: got 'dev-1-0', expected split-set-pair-sentence"):
        sentence_of("dev-1-0")


def test_order_changes_nothing():
    labels, predictions, sentences = [1, 0, 1, 0], [1, 0, 0, 0], ["a", "b", "a", "b"]
    turned = (predictions[::-1], labels[::-1], sentences[::-1])
    assert consistency(predictions, labels, sentences) == consistency(*turned) == 0.5


@pytest.mark.parametrize("form", [torch.tensor([1, 0]), torch.tensor([True, False]), ["true", "FALSE"], [1, 0]])
def test_forms_of_labels(form):
    assert accuracy(form, ["True", "False"]) == 1


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "predictions, labels: got 0 and 0"),
        ([1], [1, 0], "predictions, labels: got 1 and 2"),
        ([0.7], [1], "predictions: got 0.7, expected bool, 0 or 1"),
        (["yes"], [1], "predictions: got 'yes'"),
        ([1], [2], "labels: got 2"),
        ([float("nan")], [1], "predictions: got nan"),
    ],
)
def test_wrong_arguments_are_named(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        accuracy(predictions, labels)


def test_each_example_has_a_sentence():
    with pytest.raises(ValueError, match="sentences: got 1, expected one for each of 2 examples"):
        consistency([1, 0], [1, 0], ["a"])
