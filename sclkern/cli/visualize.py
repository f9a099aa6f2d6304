"""``sclkern visualize``: what of a picture or clip each word of its caption attends to, and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from sclkern.io import check_new_folder
from sclkern.training.opening import open_model
from sclkern.visualize.pair import read_pair
from sclkern.visualize.result import visualize


def run(options: argparse.Namespace) -> int:
    """Compute the maps, write the folder, and print where it is and what was shown."""
    check_new_folder(options.output)
    model, tokenizer = open_model(options.checkpoint, options.tokenizer)
    pair = read_pair(model.config, tokenizer, options.picture, options.caption, options.frames)
    shown = visualize(model, pair, options.target)
    shown.save(options.output, {"model": str(options.checkpoint), "picture": str(options.picture)})
    what = "no relevancy, for the model has no head for it"
    if shown.target is not None:
        what = f"relevancy for {shown.target} {shown.value:.4g}"
    print(f"{Path(options.output) / 'index.html'}: {len(pair.words) - 1} words, {len(pair.frames)} frames, {what}")
    return 0
