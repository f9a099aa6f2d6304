"""``sclkern data convert``: a published data set as arrow files."""

from __future__ import annotations

import argparse

from sclkern.data.convert import Options, convert
from sclkern.data.convert.card import card_text


def run(options: argparse.Namespace) -> int:
    """Convert and print the card."""
    chosen = Options(
        resize=options.resize,
        frames=options.frames,
        allow_missing=options.allow_missing,
        without_tests_of=tuple(name for name in options.without_tests_of.split(",") if name),
        answers=options.answers,
        seed=options.seed,
        rest_val=options.rest_val,
    )
    print(card_text(convert(options.set, options.source, options.output, chosen, workers=options.workers)), end="")
    return 0
