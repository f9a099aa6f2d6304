"""All maps of a pair, and the folder that shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from sclkern.errors import UserError
from sclkern.io import write_folder
from sclkern.models import SCLNetwork
from sclkern.visualize.maps import TARGETS, WordMaps, attention_maps, of_words, record, relevancy
from sclkern.visualize.overlay import overlay, to_shown_size
from sclkern.visualize.page import page
from sclkern.visualize.pair import Pair

RELEVANCY = "relevancy"


@dataclass(frozen=True)
class Visualization:
    """Maps of a pair.

    Attributes:
        pair: the picture or clip, and the caption.
        kinds: maps by name: "relevancy" where there is a target, then "attention of layer N", from the last layer on.
        target: of the relevancy, one of ``TARGETS``; None where there is none.
        value: the target's value for the pair.
    """

    pair: Pair
    kinds: dict[str, WordMaps]
    target: str | None
    value: float | None

    def save(self, folder: str | Path, facts: dict[str, str] | None = None) -> None:
        """Write ``index.html`` and PNG overlays of the relevancy and of the last layer's attention.

        ``relevancy/00_whole_text.png`` shows what the whole text takes from the picture, with a number and a name for
        each word; ``relevancy_back/`` what each patch takes from the words; ``attention/`` and ``attention_back/``
        likewise.

        Args:
            folder: to make; it appears whole or not at all.
            facts: texts by name for the page, such as the model.

        Raises:
            UserError: the folder is there and not empty, or cannot be written.
        """
        frames = to_shown_size(self.pair.frames)
        shown = {"target": f"{self.target}, {self.value:.4g}"} if self.target else {}
        words = [word for word, _ in self.pair.words]
        content = page(self.pair.caption, words, frames, self.kinds, {**shown, **(facts or {})})
        last = next(name for name in self.kinds if name != RELEVANCY)
        drawn = {"attention": self.kinds[last]}
        drawn |= {RELEVANCY: self.kinds[RELEVANCY]} if RELEVANCY in self.kinds else {}

        def write(temporary: Path) -> None:
            (temporary / "index.html").write_text(content, encoding="utf-8")
            for name, maps in drawn.items():
                for part, heats in ((name, maps.to_image), (f"{name}_back", maps.from_image)):
                    (temporary / part).mkdir()
                    for number, (word, heat) in enumerate(zip(words, heats, strict=True)):
                        overlay(frames, heat).save(temporary / part / _file_name(number, word))

        write_folder(folder, write)


def visualize(model: SCLNetwork, pair: Pair, target: str | None = None) -> Visualization:
    """Compute every map of a pair.

    Args:
        model: with one fusion layer at least and parameters that require gradients; in eval mode when this returns.
        pair: of ``read_pair`` with this model's config.
        target: one of ``TARGETS``; None takes the first whose head the model has, or shows no relevancy.

    Returns:
        The maps.

    Raises:
        UserError: the model has no fusion layer, not the head of the target, or gives no finite number.
    """
    if not model.config.fusion_layers:
        raise UserError("the model has no fusion layer (fusion_layers 0), whose attention would be shown; give another")
    there = [name for name in TARGETS if name in model.config.heads]
    if target is not None and target not in there:
        raise UserError(
            f"--target: got {target!r}, the model has {', '.join(there) or 'no such head'}; "
            f"{'choose one of these' if there else 'leave --target out, which shows attention alone'}"
        )
    target = target or next(iter(there), None)
    model.eval()
    with torch.enable_grad():
        recorded = record(model, pair.pixels, pair.ids)
        value = None if target is None else TARGETS[target](model, recorded.fused)
        if not recorded.fused.text.isfinite().all() or (value is not None and not value.isfinite()):
            raise UserError("the model gives no finite numbers for this pair; take a checkpoint with finite weights")
        positions = [tokens for _, tokens in pair.words]
        frames = recorded.fused.image.num_frames
        kinds = {}
        if value is not None:
            kinds[RELEVANCY] = of_words(relevancy(recorded, value), positions, frames)
            value = value.detach()
        for layer in reversed(range(len(recorded.fusion))):
            kinds[f"attention of layer {layer + 1}"] = of_words(attention_maps(recorded, layer), positions, frames)
    return Visualization(pair, kinds, target, None if value is None else value.item())


def _file_name(number: int, word: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9]+", "_", word).strip("_")[:24]
    return f"{number:02d}{plain and '_'}{plain}.png"
