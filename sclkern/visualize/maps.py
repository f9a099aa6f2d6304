"""Attention between a caption and its picture, raw, and by the relevancy rule for co-attention.

The rule is that of Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers", arXiv 2103.15679. One pair at a time: Lt text tokens without padding, Li image tokens,
those of F frames in the order of ``VisionFeatures``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from sclkern.models import SCLNetwork
from sclkern.models.fusion import LayerAttention
from sclkern.models.network import FusedFeatures


class Recorded(NamedTuple):
    """A pair that went through the network, with the attention probabilities of every block and their graph.

    Attributes:
        fused: the features of the pair, B = 1, with ``attentions``.
        text: (1, H, Lt, Lt) of each block of the text encoder.
        vision: (1, H, Li, Li) of each block of the vision encoder, tokens frame by frame with each CLS first.
    """

    fused: FusedFeatures
    text: list[Tensor]
    vision: list[Tensor]

    @property
    def fusion(self) -> list[LayerAttention]:
        """Of each layer of the fusion encoder."""
        return self.fused.attentions or []


class PairMaps(NamedTuple):
    """What each token takes from each other: rows are the tokens that look, columns those that are looked at.

    Attributes:
        text: (Lt, Lt).
        text_to_image: (Lt, Li).
        image: (Li, Li).
        image_to_text: (Li, Lt).
    """

    text: Tensor
    text_to_image: Tensor
    image: Tensor
    image_to_text: Tensor


class WordMaps(NamedTuple):
    """Maps between words and pictures. The tokens of a word are summed. W entries: the whole text, then each word.

    Attributes:
        to_image: (W, F, G, G), from a word to the patches.
        from_image: (W, F, G, G), from the patches to a word.
        from_frames: (W, F), from the CLS of each frame to a word.
    """

    to_image: Tensor
    from_image: Tensor
    from_frames: Tensor


def record(model: SCLNetwork, pixels: Tensor, ids: Tensor) -> Recorded:
    """Run a pair through the network by the eager definition of attention, which keeps the probabilities.

    Args:
        model: with one fusion layer at least; put it into eval mode.
        pixels: (3, S, S) or (F, 3, S, S) transformed picture or clip, normalised.
        ids: (Lt,) int64, a caption without padding.

    Returns:
        The pair, on the model's device. Under ``torch.no_grad`` it has no graph.

    Raises:
        ValueError: the model has no fusion layer; or as ``SCLNetwork.encode_text`` and ``encode_image``.
    """
    if not model.config.fusion_layers:
        raise ValueError("model: got fusion_layers 0, expected 1 or more, whose attention is shown")
    parameter = next(model.parameters())
    ids = ids[None].to(parameter.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    text: list[Tensor] = []
    vision: list[Tensor] = []
    image = model.encode_image(pixels[None].to(parameter), attentions=vision)
    fused = model.run_fusion(model.encode_text(ids, mask, attentions=text), mask, image, return_attention=True)
    return Recorded(fused, text, vision)


def attention_maps(recorded: Recorded, layer: int = -1) -> PairMaps:
    """The attention probabilities of a fusion layer; of its heads the largest, as ALIGN-BENCH and the paper show them.

    Args:
        recorded: of ``record``.
        layer: of the fusion encoder.

    Returns:
        The maps, without a graph.
    """
    return PairMaps(*(probabilities[0].detach().amax(0) for probabilities in recorded.fusion[layer]))


def relevancy(recorded: Recorded, target: Tensor) -> PairMaps:
    """Relevancy of each token for each other, for a number that the network computes from the pair.

    Each block adds what it mixes, Ā being the mean over heads of the positive part of probabilities times their
    gradients (equation 5 of the paper):

    - self-attention of a stream s: ``R_ss += Ā R_ss`` and ``R_sq += Ā R_sq`` (6, 7);
    - its attention to the other stream q: ``R_sq += N(R_ss)^T Ā N(R_qq)`` and ``R_ss += Ā R_qs`` (10, 11), where
      ``N(R) = (R - I) / its row sums + I`` (8, 9), and rows of zeros stay zeros.

    They start at the identity and at zero. Both streams of a fusion layer read the outputs of the layer before, so what
    stands for q there is as it was before the layer, as the network computes it.

    Args:
        recorded: of ``record``, with its graph, which is freed.
        target: a number computed from ``recorded.fused``, such as ``TARGETS["itm"]``.

    Returns:
        The maps, without a graph. Rows of tokens whose output does not reach the target show what they took in the
        layers before.

    Raises:
        ValueError: there is no graph, or the target is not one number.
    """
    if target.numel() != 1:
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected one number")
    maps = [*recorded.text, *recorded.vision, *(one for layer in recorded.fusion for one in layer)]
    if not all(one.requires_grad for one in maps) or not target.requires_grad:
        raise ValueError(
            "recorded: has no graph, expected one; record outside of torch.no_grad, and with parameters that require "
            "gradients: model.requires_grad_()"
        )
    gradients = torch.autograd.grad(target.sum(), maps, allow_unused=True)
    weighted = iter([_weighted(one.detach(), gradient) for one, gradient in zip(maps, gradients, strict=True)])
    text, image = (
        torch.eye(one.shape[-1], dtype=one.dtype, device=one.device)
        for one in (recorded.fusion[0].text, recorded.fusion[0].image)
    )
    for _ in recorded.text:
        text = text + next(weighted) @ text
    order = _fused_order(recorded)
    for _ in recorded.vision:
        image = image + next(weighted)[order][:, order] @ image
    state = PairMaps(text, text.new_zeros(len(text), len(image)), image, text.new_zeros(len(image), len(text)))
    for _ in recorded.fusion:
        state = _through_layer(state, LayerAttention(next(weighted), next(weighted), next(weighted), next(weighted)))
    return state


def _weighted(probabilities: Tensor, gradient: Tensor | None) -> Tensor:
    """Ā of (1, H, Lq, Lk) probabilities, (Lq, Lk). A map that the target does not depend on has no gradient."""
    if gradient is None:
        return torch.zeros_like(probabilities[0, 0])
    return (probabilities * gradient)[0].clamp(min=0).mean(0)


def _fused_order(recorded: Recorded) -> Tensor:
    """Places of the fused order of image tokens, CLS of all frames first, in that of the vision encoder."""
    tokens, frames = recorded.fused.image.tokens, recorded.fused.image.num_frames
    places = torch.arange(tokens.shape[1], device=tokens.device).view(frames, -1)
    return torch.cat([places[:, 0], places[:, 1:].flatten()])


def _through_layer(before: PairMaps, layer: LayerAttention) -> PairMaps:
    text, text_to_image = (x + layer.text @ x for x in (before.text, before.text_to_image))
    image, image_to_text = (x + layer.image @ x for x in (before.image, before.image_to_text))
    return PairMaps(
        text + layer.text_to_image @ before.image_to_text,
        text_to_image + _normalized(text).T @ layer.text_to_image @ _normalized(before.image),
        image + layer.image_to_text @ before.text_to_image,
        image_to_text + _normalized(image).T @ layer.image_to_text @ _normalized(before.text),
    )


def _normalized(relevancies: Tensor) -> Tensor:
    identity = torch.eye(len(relevancies), dtype=relevancies.dtype, device=relevancies.device)
    added = relevancies - identity
    sums = added.sum(1, keepdim=True)
    return added / torch.where(sums == 0, 1, sums) + identity


def _itm(model: SCLNetwork, fused: FusedFeatures) -> Tensor:
    """The logit that picture and caption match."""
    return model.itm_head(model.pool(*fused.cls))[0, 1]


def _rank(model: SCLNetwork, fused: FusedFeatures) -> Tensor:
    """The score by which retrieval ranks."""
    return model.rank_head(model.pool(*fused.cls))[0, 0]


def _vqa(model: SCLNetwork, fused: FusedFeatures) -> Tensor:
    """The logit of the likeliest answer."""
    return model.vqa_head(model.pool(*fused.cls))[0].max()


# By the head of the model that computes it.
TARGETS: MappingProxyType[str, Callable[[SCLNetwork, FusedFeatures], Tensor]] = MappingProxyType(
    {"itm": _itm, "rank": _rank, "vqa": _vqa}
)


def of_words(maps: PairMaps, words: Sequence[Sequence[int]], num_frames: int) -> WordMaps:
    """Sum the tokens of each word.

    Args:
        maps: of a pair.
        words: W lists of positions in the text.
        num_frames: F.

    Returns:
        The maps, on the CPU.
    """
    chosen = maps.text.new_zeros(len(words), len(maps.text))
    for number, positions in enumerate(words):
        chosen[number, list(positions)] = 1
    patches = (maps.image.shape[0] - num_frames) // num_frames
    grid = num_frames, round(patches**0.5), -1
    to_image, from_image = chosen @ maps.text_to_image, (maps.image_to_text @ chosen.T).T
    return WordMaps(
        to_image[:, num_frames:].unflatten(1, grid).cpu(),
        from_image[:, num_frames:].unflatten(1, grid).cpu(),
        from_image[:, :num_frames].cpu(),
    )
