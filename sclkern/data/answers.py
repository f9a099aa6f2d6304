"""The answers of VQAv2: the official normalisation, the list of kept answers, soft scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# Answers that are given less often are no classes.
LEAST = 9
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_BETWEEN_DIGITS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The official code gives a flag where the count stands, whose value is 32.
_FULL_STOPS = 32
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}  # fmt: skip
# The official table restores the apostrophes of these; of several, one at a time.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've 'ow's'at
"""


def _restored() -> dict[str, str]:
    table: dict[str, str] = {}
    for word in _CONTRACTED.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in places}
    # One entry of the official table goes the other way.
    return table | {"somebody'd": "somebodyd"}


_RESTORED = _restored()


def on_one_line(answer: str) -> str:
    """An answer without line breaks, tabs and white space around it: what the official evaluation always does."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(text: str) -> str:
    """An answer in the form in which the official evaluation compares it.

    Args:
        text: as it was given.

    Returns:
        It in lower case, without punctuation and articles, numbers up to ten as digits.
    """
    text = on_one_line(text)
    remove_all = _BETWEEN_DIGITS.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if remove_all or f"{mark} " in text or f" {mark}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", out, count=_FULL_STOPS).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def kept_answers(given: Iterable[str]) -> list[str]:
    """The classes.

    Args:
        given: ``multiple_choice_answer`` of every annotation, training first.

    Returns:
        Normalised answers that were given 9 times or more, in order of first occurrence.
    """
    return [answer for answer, count in Counter(map(normalize_answer, given)).items() if count >= LEAST]


def soft_scores(answers: Iterable[str], *, normalize: bool = True) -> dict[str, float]:
    """Targets of a question: what the official accuracy gives to each answer of its annotators.

    Args:
        answers: of the annotators.
        normalize: compare them normalised; False takes them as they are, as the published code does.

    Returns:
        .3, .6, .9 or 1 for 1, 2, 3 or more equal answers, in order of their first.
    """
    counts = Counter(map(normalize_answer, answers) if normalize else answers)
    return {answer: min(round(0.3 * count, 1), 1.0) for answer, count in counts.items()}
