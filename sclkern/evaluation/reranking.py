"""Scores of pairs by a head of the fusion encoder: of the best candidates by contrast, or of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sclkern.evaluation.gallery import Batches, EncodedImages, Relevance
from sclkern.evaluation.matching import EncodedTexts, ImageBatch
from sclkern.evaluation.ranking import Standing, row_parts, standings
from sclkern.models import SCLNetwork

Score = Literal["log_odds", "logit", "logit+similarity", "rank"]
# Image tokens that are fused at a time: on a CPU those that a cache has room for beside the weights.
_TOKENS = {"cuda": 2**16}
_TOKENS_OF_OTHERS = 2**13


@dataclass(frozen=True)
class Reranking:
    """How pairs are scored by the fusion encoder.

    Attributes:
        candidates: of each query, in both directions, the first by contrast; the others stay behind them, in the order
            of their contrast (the published code gives them -100: no recall up to ``candidates`` differs). None scores
            all pairs, as the published code of SCL and METER does.
        score: "log_odds" is ITM's logit of a match minus that of none; "logit" is the first alone (ALBEF, and SCL
            without fine-tuning); "logit+similarity" adds the cosine (BLIP); "rank" is the head that fine-tuning for
            retrieval trains.
    """

    candidates: int | None = 16
    score: Score = "log_odds"

    def __post_init__(self) -> None:
        if self.candidates is not None and self.candidates < 1:
            raise ValueError(f"candidates: got {self.candidates}, expected 1 or more, or None for all pairs")
        if self.score not in get_args(Score):
            raise ValueError(f"score: got {self.score!r}, expected one of {', '.join(get_args(Score))}")

    @property
    def head(self) -> str:
        """The head that scores."""
        return "rank" if self.score == "rank" else "itm"


@dataclass(frozen=True)
class Pairs:
    """The pairs that are scored.

    Attributes:
        texts: C.
        chosen: (pairs,) ascending numbers, image row * C + text row; None stands for all pairs.
    """

    texts: int
    chosen: np.ndarray | None

    def of_images(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and text rows of the pairs of images [start, stop), image by image."""
        if self.chosen is None:
            numbers = np.arange(start * self.texts, stop * self.texts)
        else:
            numbers = self.chosen[slice(*np.searchsorted(self.chosen, (start * self.texts, stop * self.texts)))]
        image, text = np.divmod(numbers, self.texts)
        return image, text

    def places(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Where the scores of these pairs are."""
        numbers = image * self.texts + text
        return numbers if self.chosen is None else np.searchsorted(self.chosen, numbers)


def choose_candidates(similarity: Tensor, count: int, by_image: bool) -> Tensor:
    """The best candidates of each query by contrast; NaN is the worst score.

    Args:
        similarity: (N, C).
        count: of each query; fewer where there are fewer candidates.
        by_image: whether images are the queries.

    Returns:
        (queries, count) int64 on the host.
    """
    scores = similarity if by_image else similarity.T
    # Of the queries of one part at a time, because a file may hold the scores.
    return torch.cat(
        [
            torch.where(scores[part].isnan(), -torch.inf, scores[part]).topk(min(count, scores.shape[1])).indices.cpu()
            for part in row_parts(scores)
        ]
    )


def pairs_of_candidates(candidates: dict[bool, Tensor], texts: int) -> Pairs:
    """The pairs of both directions, each once.

    Args:
        candidates: of ``choose_candidates``, by ``by_image``.
        texts: C.

    Returns:
        The pairs.
    """
    of_images, of_texts = candidates[True].numpy(), candidates[False].numpy()
    numbers = [
        (np.arange(len(of_images))[:, None] * texts + of_images).ravel(),
        (of_texts * texts + np.arange(len(of_texts))[:, None]).ravel(),
    ]
    return Pairs(texts, np.unique(np.concatenate(numbers)))


def score_pairs(
    model: SCLNetwork,
    images: EncodedImages,
    texts: EncodedTexts,
    pairs: Pairs,
    score: Score,
    similarity: Tensor | None,
    batches: Batches,
) -> Tensor:
    """Scores of pairs by the fusion encoder, those of an image by the rank that has its tokens.

    Args:
        model: in eval mode.
        images: with their tokens.
        texts: of the pairs.
        pairs: which.
        score: of ``Reranking``.
        similarity: (N, C); only for "logit+similarity".
        batches: of this process.

    Returns:
        (pairs,) float32 on the host, in the order of ``Pairs``.
    """
    device = next(model.parameters()).device
    own: dict[int, Tensor] = {}
    for number in images.places:
        batches.between()
        batch = ImageBatch(model, images.of_batch(number, device))
        start, stop = images.batches[number]
        image, text = pairs.of_images(start, stop)
        order = np.argsort(texts.lengths[text], kind="stable")
        at_once = max(1, _TOKENS.get(device.type, _TOKENS_OF_OTHERS) // batch.length)
        scores = torch.empty(len(image), dtype=torch.float32)
        for first in range(0, len(order), at_once):
            batches.between()
            part = order[first : first + at_once]
            pooled = batch.pooled(texts, image[part] - start, text[part])
            scores[torch.from_numpy(part)] = _score(model, pooled, score).cpu()
        if score == "logit+similarity" and similarity is not None:
            scores += similarity[torch.from_numpy(image), torch.from_numpy(text)].cpu()
        own[number] = scores.to(device)
    return batches.joined(own).cpu()


def _score(model: SCLNetwork, pooled: Tensor, score: Score) -> Tensor:
    """In float32 whatever the precision: in half of it, near scores would tie."""
    with torch.autocast(pooled.device.type, enabled=False):
        head = model.rank_head if score == "rank" else model.itm_head
        logits = head(pooled.to(head.weight.dtype))
    if score == "rank":
        return logits[:, 0].float()
    return (logits[:, 1] - logits[:, 0]).float() if score == "log_odds" else logits[:, 1].float()


def reranked_standings(
    scores: Tensor, pairs: Pairs, candidates: Tensor, similarity: Tensor, relevance: Relevance, by_image: bool
) -> Iterator[Standing]:
    """Where the best right answer of each query stands: candidates first, then the others by contrast, then NaN.

    Args:
        scores: of ``score_pairs``.
        pairs: with those of the candidates.
        candidates: (queries, k) of ``choose_candidates``.
        similarity: (N, C), which orders the others.
        relevance: of the gallery.
        by_image: whether images are the queries.

    Yields:
        For each query, in no order.
    """
    of_queries = similarity if by_image else similarity.T
    for part in row_parts(of_queries):
        chosen = candidates[part]
        relevant = relevance.tile(part, by_image, chosen.device)
        queries = np.arange(part.start, part.stop)[:, None]
        ends = (queries, chosen.numpy()) if by_image else (chosen.numpy(), queries)
        contrast, of_chosen = of_queries[part].cpu(), scores[torch.from_numpy(pairs.places(*ends))]
        # What stands in each of the three parts, as candidates of a row of their own.
        others = torch.ones_like(relevant).scatter_(1, chosen, False) & ~contrast.isnan()
        first = torch.zeros_like(relevant).scatter_(1, chosen, ~of_chosen.isnan())
        scored = torch.zeros_like(contrast).scatter_(1, chosen, of_chosen)
        levels = (scored, first), (contrast, others), (torch.zeros_like(contrast), ~first & ~others)
        left = torch.ones(len(chosen), dtype=torch.bool)
        before = torch.zeros(len(chosen), dtype=torch.int64)
        for values, present in levels:
            here = left & (relevant & present).any(1)
            found = standings(values[here], relevant[here], present[here]) if here.any() else []
            for one, above in zip(found, before[here].tolist(), strict=True):
                yield one._replace(above=one.above + above)
            left, before = left & ~here, before + present.sum(1)


def standings_of(
    scores: Callable[[slice], Tensor], parts: list[slice], relevance: Relevance, by_image: bool
) -> Iterator[Standing]:
    """Where the best right answer of each query stands, of scores of all pairs.

    Args:
        scores: (queries, candidates) of a part.
        parts: of the queries.
        relevance: of the gallery.
        by_image: whether images are the queries.

    Yields:
        For each query.
    """
    for part in parts:
        of_part = scores(part)
        yield from standings(of_part, relevance.tile(part, by_image, of_part.device))
