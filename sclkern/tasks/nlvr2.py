"""NLVR2's two metrics: accuracy, and consistency over the pairs of a sentence."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

_LABELS = {"true": True, "false": False}


def accuracy(predictions: Iterable[Any], labels: Iterable[Any]) -> float:
    """Share of examples that are answered right.

    Args:
        predictions: of the examples, bool, 0 and 1, or "True" and "False", the strings of the published files.
        labels: likewise, of the same examples.

    Returns:
        In [0, 1].

    Raises:
        ValueError: no examples, unequal numbers, or another value.
    """
    right = _right(predictions, labels)
    return sum(right) / len(right)


def consistency(predictions: Iterable[Any], labels: Iterable[Any], sentences: Sequence[Hashable]) -> float:
    """Share of sentences that are answered right for every pair of pictures that they are said of.

    Args:
        predictions: as in ``accuracy``.
        labels: as in ``accuracy``.
        sentences: of each example, what tells its sentence from all others: ``sentence_of`` its identifier, or its set
            with its text.

    Returns:
        In [0, 1].

    Raises:
        ValueError: as in ``accuracy``.
    """
    right = _right(predictions, labels)
    if len(sentences) != len(right):
        raise ValueError(f"sentences: got {len(sentences)}, expected one for each of {len(right)} examples")
    consistent: dict[Hashable, bool] = {}
    for sentence, one in zip(sentences, right, strict=True):
        consistent[sentence] = consistent.get(sentence, True) and one
    return sum(consistent.values()) / len(consistent)


def sentence_of(identifier: str) -> str:
    """The sentence that an example is about.

    Args:
        identifier: of the published files, ``split-set-pair-sentence``.

    Returns:
        The identifier without its pair.

    Raises:
        ValueError: it has other parts.
    """
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"identifier: got {identifier!r}, expected split-set-pair-sentence, such as dev-850-0-1")
    split, of_set, _, sentence = parts
    return f"{split}-{of_set}-{sentence}"


def _right(predictions: Iterable[Any], labels: Iterable[Any]) -> list[bool]:
    said, true = ([_truth(name, one) for one in of] for name, of in (("predictions", predictions), ("labels", labels)))
    if len(said) != len(true) or not true:
        raise ValueError(f"predictions, labels: got {len(said)} and {len(true)}, expected equally many, one or more")
    return [one == label for one, label in zip(said, true, strict=True)]


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _LABELS:
        return _LABELS[value.lower()]
    # Also of numpy and torch: their scalars equal the numbers that they are.
    if not isinstance(value, str) and value in (0, 1):
        return bool(value)
    raise ValueError(
        f"{name}: got {value!r}, expected bool, 0 or 1, or 'True' or 'False'; of logits, give their argmax"
    )
