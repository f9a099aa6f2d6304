"""Retrieval: recall by ITC similarity, and by a head of the fusion encoder.

By default captions are scored by group: images that share a caption are all right answers to it, and each distinct
caption is one candidate. If each image has a caption of its own, this is the usual protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sclkern.data import PairSource
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.undecodable import UndecodableImages
from sclkern.distributed import world_size
from sclkern.errors import UserError
from sclkern.evaluation.gallery import (
    Batches,
    ChooseFrames,
    Relevance,
    Transform,
    encode_images,
    encode_texts,
    similarities,
)
from sclkern.evaluation.ranking import RECALL_AT, Standing, row_parts, rsum, summary
from sclkern.evaluation.reranking import (
    Pairs,
    Reranking,
    choose_candidates,
    pairs_of_candidates,
    reranked_standings,
    score_pairs,
    standings_of,
)
from sclkern.evaluation.room import Room
from sclkern.models import SCLNetwork

DIRECTIONS = {"image_to_text": True, "text_to_image": False}


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls of one retrieval.

    Attributes:
        images: number of images retrieved from.
        captions: number of captions retrieved from.
        recalls: fractions under keys such as "itc_text_to_image_r1"; methods are "itc", "itm" or "rank" (the head that
            re-ranked) and "chance", the expectation of a random order.
        ranks: "median_rank" and "mean_rank" of the first right answer under such keys.
    """

    images: int
    captions: int
    recalls: dict[str, float]
    ranks: dict[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The best method: the head that re-ranked, else "itc"."""
        return next(name for name in ("rank", "itm", "itc") if f"{name}_image_to_text_r1" in self.recalls)

    @property
    def sum(self) -> float:
        """Sum of the best method's six recalls (rsum), by which the best checkpoint is chosen."""
        return rsum(*({f"r{k}": self.recalls[f"{self.method}_{way}_r{k}"] for k in RECALL_AT} for way in DIRECTIONS))

    def line(self) -> str:
        """The best method's recalls in percent, in one line."""
        parts = []
        for direction in DIRECTIONS:
            values = [f"{100 * self.recalls[f'{self.method}_{direction}_r{k}']:.1f}" for k in RECALL_AT]
            parts.append(f"{direction.replace('_', ' ')} {'/'.join(values)} %")
        return f"recall@{'/'.join(map(str, RECALL_AT))} {', '.join(parts)}"


@torch.no_grad()
def evaluate_retrieval(
    model: SCLNetwork,
    source: PairSource,
    tokenizer: CaptionTokenizer,
    transform: Transform,
    *,
    batch_size: int = 64,
    rerank: int | Reranking = 16,
    ks: Sequence[int] = RECALL_AT,
    max_images: int | None = None,
    distinct_captions: bool = True,
    choose_frames: ChooseFrames | None = None,
    precision: torch.dtype | None = None,
    room: Room | None = None,
    undecodable: UndecodableImages | None = None,
    between_batches: Callable[[], object] = lambda: None,
    distributed: bool = False,
) -> RetrievalResult:
    """Compute recalls in both directions over the images of a source.

    Each image and each text is encoded once. Of the images, each rank keeps the tokens that it encodes, where there is
    room for them (``Room``), and scores their pairs.

    Args:
        model: put into eval mode meanwhile.
        source: images or clips, and captions.
        tokenizer: the model's.
        transform: maps a PIL image to (3, S, S), uint8 or normalised floats.
        batch_size: images or captions encoded at a time.
        rerank: candidates of ITC whose order the matching head makes, in each direction; 0 leaves that of ITC; a
            ``Reranking`` says more.
        ks: how many first candidates a recall looks at, beside 1, 5 and 10.
        max_images: images to retrieve from, spread evenly over the source; None takes all.
        distinct_captions: count equal captions as one, whose images are all right answers; False takes each caption of
            each image as a candidate of its own, as published.
        choose_frames: of clips: maps their number of frames to the indices that are read; None takes the middle frame.
        precision: of autocast in the encoders and the fusion encoder; scores are float32 anyway. None computes in the
            model's own dtype.
        room: for tokens and similarities; None takes half of the memory that is free, then files.
        undecodable: counts the images that cannot be decoded or are smaller than a patch, which are left out; None
            counts for this call alone.
        between_batches: called before each image is decoded and each batch is encoded or re-ranked; may raise.
        distributed: whether all ranks of the default process group call this, with the same weights, and share
            decoding, encoding and re-ranking. All return the same, which is what one process returns. The model must
            compute without collectives.

    Returns:
        The recalls.

    Raises:
        UserError: too many images are undecodable, or all; or the model lacks a head.
    """
    reranking = rerank if isinstance(rerank, Reranking) else Reranking(rerank) if rerank else None
    _check_heads(model, reranking)
    device = next(model.parameters()).device
    room = room or Room(device)
    ranks = world_size() if distributed else 1
    batches = Batches(between_batches, torch.distributed.get_rank() if ranks > 1 else 0, ranks)
    undecodable = undecodable if undecodable is not None else UndecodableImages(source.num_images)
    count = min(source.num_images, max_images or source.num_images)
    chosen = np.linspace(0, source.num_images - 1, count).round().astype(int).tolist()
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            images = encode_images(
                model, source, transform, chosen, batch_size, batches, undecodable, room,
                keep_tokens=reranking is not None, choose_frames=choose_frames,
            )  # fmt: skip
            captions, relevance = _captions(source, images.indices, distinct_captions)
            texts, text_features = encode_texts(model, tokenizer, captions, batch_size, batches)
            similarity = None
            if images.features is not None and text_features is not None:
                similarity = similarities(images.features, text_features, room)
            candidates, pairs = _candidates(reranking, similarity, len(captions))
            scores = None
            if reranking is not None and pairs is not None:
                scores = score_pairs(model, images, texts, pairs, reranking.score, similarity, batches)
    finally:
        model.train(was_training)
    wanted = (*RECALL_AT, *(k for k in ks if k not in RECALL_AT))
    recalls: dict[str, float] = {}
    positions: dict[str, float] = {}
    for direction, by_image in DIRECTIONS.items():
        methods = {}
        if similarity is not None:
            methods["itc"] = _dense(similarity, relevance, by_image)
        methods["chance"] = _chance(relevance, by_image)
        if reranking is not None and scores is not None and pairs is not None:
            methods[reranking.head] = (
                _dense(scores.view(len(images.indices), -1), relevance, by_image)
                if similarity is None or reranking.candidates is None
                else reranked_standings(scores, pairs, candidates[by_image], similarity, relevance, by_image)
            )
        for method, found in methods.items():
            values = summary(found, wanted)
            recalls |= {f"{method}_{direction}_r{k}": values[f"r{k}"] for k in wanted}
            positions |= {f"{method}_{direction}_{key}": values[key] for key in ("median_rank", "mean_rank")}
    return RetrievalResult(len(images.indices), len(captions), recalls, positions)


def _check_heads(model: SCLNetwork, reranking: Reranking | None) -> None:
    heads = model.config.heads
    needs_contrast = reranking is None or reranking.candidates is not None or reranking.score == "logit+similarity"
    needed = {*(("itc",) if needs_contrast else ()), *((reranking.head,) if reranking else ())}
    if lacking := needed - set(heads):
        raise UserError(
            f"rerank: the model has the heads {list(heads)}, this retrieval needs {sorted(lacking)} too; without 'itc' "
            "take Reranking(candidates=None), which scores all pairs"
        )


def _captions(source: PairSource, images: np.ndarray, distinct: bool) -> tuple[list[str], Relevance]:
    """Captions of these images, and which are whose."""
    row_of_image = np.full(source.num_images, -1)
    row_of_image[images] = np.arange(len(images))
    pairs = np.flatnonzero(row_of_image[source.pair_image] >= 0)
    image, text, first = row_of_image[source.pair_image[pairs]], np.arange(len(pairs)), np.arange(len(pairs))
    if distinct:
        _, first, text = np.unique(source.pair_group[pairs], return_index=True, return_inverse=True)
    numbers = np.unique(image * len(first) + text)
    relevance = Relevance(*np.divmod(numbers, len(first)), len(images), len(first))
    return [source.caption(int(pairs[i])) for i in first], relevance


def _candidates(
    reranking: Reranking | None, similarity: Tensor | None, texts: int
) -> tuple[dict[bool, Tensor], Pairs | None]:
    if reranking is None:
        return {}, None
    if reranking.candidates is None or similarity is None:
        return {}, Pairs(texts, None)
    found = {by_image: choose_candidates(similarity, reranking.candidates, by_image) for by_image in (True, False)}
    return found, pairs_of_candidates(found, texts)


def _dense(scores: Tensor, relevance: Relevance, by_image: bool) -> Iterator[Standing]:
    of_queries = scores if by_image else scores.T
    return standings_of(lambda part: of_queries[part], row_parts(of_queries), relevance, by_image)


def _chance(relevance: Relevance, by_image: bool) -> Iterator[Standing]:
    """Where a constant score leaves every query."""
    total = relevance.sizes[1 if by_image else 0]
    return (Standing(0, total, right) for right in relevance.counts(by_image).tolist())
