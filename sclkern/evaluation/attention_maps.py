"""Attention of the words of a caption over its image, as plots."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sclkern.data import PairSource
from sclkern.data.text import one_line
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import denormalize, normalize_images
from sclkern.data.undecodable import read_image
from sclkern.io import write_atomically
from sclkern.models import SCLNetwork
from sclkern.visualize.maps import attention_maps, of_words, record

_PLAIN_TEXT: Any = {"text.usetex": False, "text.parse_math": False, "savefig.bbox": None}


def choose_pairs(source: PairSource, count: int, min_size: int = 1) -> list[int]:
    """Choose pairs with different captions, spread over a source, of three words or more where there are any.

    Args:
        source: the pairs.
        count: pairs to choose at most.
        min_size: least height and width of an image in pixels: the side of a patch.

    Returns:
        Pair numbers, ascending; the images of all can be decoded. None if no image can.
    """
    _, first = np.unique(source.pair_group, return_index=True)
    pairs = sorted(first.tolist())
    while True:
        candidates = [pair for pair in pairs if len(source.caption(pair).split()) >= 3] or pairs
        spread = np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)
        chosen = [candidates[i] for i in spread]
        undecodable = {pair for pair in chosen if not _can_be_decoded(source, pair, min_size)}
        if not undecodable:
            return chosen
        pairs = [pair for pair in pairs if pair not in undecodable]


def _can_be_decoded(source: PairSource, pair: int, min_size: int) -> bool:
    try:
        read_image(source, int(source.pair_image[pair]), min_size)
    except ValueError:
        return False
    return True


@torch.no_grad()
def word_attention(
    model: SCLNetwork, pixels: Tensor, caption: str, tokenizer: CaptionTokenizer
) -> list[tuple[str, Tensor]]:
    """Attention over the patches of an image: of the whole caption (its CLS token), then of each word.

    The probabilities are those of the last fusion layer, text to image, without the image's CLS token. The largest over
    the heads is taken and the tokens of a word are summed, as ALIGN-BENCH reads attention.

    Args:
        model: in eval mode, with one fusion layer at least.
        pixels: (3, S, S) transformed image, normalised.
        caption: text of the image.
        tokenizer: the model's.

    Returns:
        Word and map for each word, the map (grid, grid) float32 on the CPU.
    """
    ids, _ = tokenizer([caption], model.config.max_text_len)
    words = [("whole text", [0]), *tokenizer.words(ids[0].tolist())]
    maps = of_words(attention_maps(record(model, pixels, ids[0])), [positions for _, positions in words], 1)
    return [(word, heat[0].float()) for (word, _), heat in zip(words, maps.to_image, strict=True)]


def plot_attention(
    path: Path,
    model: SCLNetwork,
    source: PairSource,
    pairs: Sequence[int],
    tokenizer: CaptionTokenizer,
    transform: Callable[[Image.Image], Tensor],
    *,
    words_shown: int = 5,
) -> None:
    """Draw a row for each pair: the image, then the attention of the whole caption and of its first words over it.

    Args:
        path: PNG file to write.
        model: in eval mode when this returns; one fusion layer at least.
        source: the pairs.
        pairs: pair numbers to draw, one or more, with images that can be decoded.
        tokenizer: the model's.
        transform: maps a PIL image to (3, S, S), uint8 or normalised floats.
        words_shown: words of a caption to draw at most.
    """
    model.eval()
    # A caption is data: a dollar sign begins no formula. Warnings are of letters that the font lacks, drawn as boxes.
    with matplotlib.rc_context(_PLAIN_TEXT), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(1.7 * (words_shown + 2), 1.85 * len(pairs)))
        axes = figure.subplots(len(pairs), words_shown + 2, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for row, pair in zip(axes, pairs, strict=True):
            caption = source.caption(pair)
            pixels = normalize_images(transform(source.image(int(source.pair_image[pair]))))
            shown = denormalize(pixels).permute(1, 2, 0).numpy()
            row[0].imshow(shown)
            row[0].set_title(one_line(caption, 24), fontsize=7)
            for axis, (word, attention) in zip(
                row[1:], word_attention(model, pixels, caption, tokenizer), strict=False
            ):
                heat = attention.numpy()
                heat = (heat - heat.min()) / max(heat.max() - heat.min(), 1e-12)
                axis.imshow(shown)
                sides = (-0.5, shown.shape[1] - 0.5, shown.shape[0] - 0.5, -0.5)
                axis.imshow(heat, cmap="jet", alpha=0.5, interpolation="bilinear", extent=sides)
                axis.set_title(one_line(word, 16), fontsize=8)
        figure.tight_layout()
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
