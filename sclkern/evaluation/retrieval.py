"""Zero-shot retrieval: recall at 1, 5 and 10 by ITC similarity, and re-ranked by image-text matching.

Captions are scored by group: images that share a caption are all right answers to it, and each distinct caption is
one candidate. If each image has a caption of its own, this is the usual protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sclkern.data import PairSource
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import normalize_images
from sclkern.data.undecodable import UndecodableImages, read_image
from sclkern.distributed import gather_parts, merge, world_size
from sclkern.errors import UserError
from sclkern.evaluation.ranking import RECALL_AT, recall_of_relevant
from sclkern.models import SCLNetwork, VisionFeatures
from sclkern.models.captions import first_token

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls of one retrieval.

    Attributes:
        images: number of images retrieved from.
        captions: number of distinct captions retrieved from.
        recalls: fractions under keys such as "itc_text_to_image_r1"; methods are "itc", "itm" (if re-ranked) and
            "chance", the expectation of a random order.
    """

    images: int
    captions: int
    recalls: dict[str, float]

    @property
    def sum(self) -> float:
        """Sum of the best method's six recalls, by which the best checkpoint is chosen."""
        method = "itm" if "itm_image_to_text_r1" in self.recalls else "itc"
        return sum(value for key, value in self.recalls.items() if key.startswith(method))

    def line(self) -> str:
        """The best method's recalls in percent, in one line."""
        method = "itm" if "itm_image_to_text_r1" in self.recalls else "itc"
        parts = []
        for direction in ("image_to_text", "text_to_image"):
            values = [f"{100 * self.recalls[f'{method}_{direction}_r{k}']:.1f}" for k in RECALL_AT]
            parts.append(f"{direction.replace('_', ' ')} {'/'.join(values)} %")
        return f"recall@{'/'.join(map(str, RECALL_AT))} {', '.join(parts)}"


@dataclass(frozen=True)
class _Gallery:
    """Encoded images and distinct captions, on the model's device.

    Attributes:
        image: tokens of N images.
        text: (C, L, width) tokens of C captions.
        text_mask: (C, L) bool.
        similarity: (N, C) float32, cosine of the projected CLS tokens.
        relevant: (N, C) bool, which captions are an image's.
    """

    image: VisionFeatures
    text: Tensor
    text_mask: Tensor
    similarity: Tensor
    relevant: Tensor


@dataclass(frozen=True)
class _Batches:
    """Work in batches, which ranks deal out to one another whole: so each batch gives the same numbers for any number
    of ranks.

    Attributes:
        between: called before each batch.
        rank: of this process.
        ranks: number of processes.
    """

    between: Callable[[], object]
    rank: int
    ranks: int

    def own(self, rows: int, size: int) -> Iterator[tuple[int, slice]]:
        """Number and rows of this rank's batches of ``size`` rows."""
        for number in range(self.rank, math.ceil(rows / size), self.ranks):
            self.between()
            yield number, slice(number * size, (number + 1) * size)

    def joined(self, own: dict[int, Tensor]) -> Tensor:
        """Rows of the batches of all ranks, in order, from those of this rank by number."""
        return torch.cat(list(own.values())) if self.ranks == 1 else gather_parts(own)

    def merged(self, own: dict[K, V]) -> dict[K, V]:
        """What all ranks have found."""
        return own if self.ranks == 1 else merge(own)


@torch.no_grad()
def evaluate_retrieval(
    model: SCLNetwork,
    source: PairSource,
    tokenizer: CaptionTokenizer,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 64,
    rerank: int = 16,
    max_images: int | None = None,
    undecodable: UndecodableImages | None = None,
    between_batches: Callable[[], object] = lambda: None,
    distributed: bool = False,
) -> RetrievalResult:
    """Compute recalls in both directions over the images of a source.

    Every encoded token is held at once, on the model's device.

    Args:
        model: put into eval mode meanwhile.
        source: images and captions.
        tokenizer: the model's.
        transform: maps a PIL image to (3, S, S), uint8 or normalised floats.
        batch_size: images or captions encoded at a time.
        rerank: candidates of ITC that the matching head re-ranks, in each direction; 0 does not re-rank.
        max_images: images to retrieve from, spread evenly over the source; None takes all.
        undecodable: counts the images that cannot be decoded or are smaller than a patch, which are left out; None
            counts for this call alone.
        between_batches: called before each image is decoded and each batch is encoded or re-ranked; may raise.
        distributed: whether all ranks of the default process group call this, with the same weights, and share
            decoding, encoding and re-ranking. All return the same, which is what one process returns. The model must
            compute without collectives.

    Returns:
        The recalls.

    Raises:
        UserError: too many images are undecodable, or all.
    """
    was_training = model.training
    model.eval()
    ranks = world_size() if distributed else 1
    batches = _Batches(between_batches, torch.distributed.get_rank() if ranks > 1 else 0, ranks)
    undecodable = undecodable if undecodable is not None else UndecodableImages(source.num_images)
    image, images = _encode_images(model, source, transform, max_images, batch_size, undecodable, batches)
    captions, relevant = _captions(source, images)
    text, text_mask = _encode_texts(model, tokenizer, captions, batch_size, batches)
    gallery = _gallery(model, image, text, text_mask, relevant)
    values: dict[str, float] = {}
    for direction in ("image_to_text", "text_to_image"):
        by_image = direction == "image_to_text"
        scores, answers = (x if by_image else x.T for x in (gallery.similarity, gallery.relevant))
        # A constant score gives chance.
        chance = torch.zeros_like(scores)
        methods = {"itc": recall_of_relevant(scores, answers), "chance": recall_of_relevant(chance, answers)}
        if rerank:
            reranked = _rerank(model, gallery, scores, by_image, rerank, 4 * batch_size, batches)
            methods["itm"] = recall_of_relevant(reranked, answers)
        values |= {f"{method}_{direction}_r{k}": row[f"r{k}"] for method, row in methods.items() for k in RECALL_AT}
    model.train(was_training)
    return RetrievalResult(len(images), len(captions), values)


def _encode_images(
    model: SCLNetwork,
    source: PairSource,
    transform: Callable[[Image.Image], Tensor],
    max_images: int | None,
    batch_size: int,
    undecodable: UndecodableImages,
    batches: _Batches,
) -> tuple[VisionFeatures, np.ndarray]:
    """Tokens of N images and image indices (N,) of those that can be decoded."""
    device = next(model.parameters()).device
    reduction = getattr(transform, "reduction", None)
    count = min(source.num_images, max_images or source.num_images)
    chosen = np.linspace(0, source.num_images - 1, count).round().astype(int).tolist()
    encoded: dict[int, Tensor] = {}
    images: dict[int, list[int]] = {}
    left_out: dict[str, str] = {}
    for number, rows in batches.own(count, batch_size):
        pixels = []
        for image in chosen[rows]:
            batches.between()
            try:
                decoded = read_image(source, image, model.config.patch_size, reduction)
            except ValueError as error:
                left_out[source.image_name(image)] = str(error)
                continue
            pixels.append(transform(decoded))
            images.setdefault(number, []).append(image)
        if pixels:
            encoded[number] = model.encode_image(normalize_images(torch.stack(pixels).to(device))).tokens
    images = batches.merged(images)
    undecodable.add(batches.merged(left_out))
    if not images:
        raise UserError(f"none of {count} images to retrieve from can be decoded, expected one or more; see the log")
    return VisionFeatures(batches.joined(encoded), 1), np.concatenate([images[number] for number in sorted(images)])


def _captions(source: PairSource, images: np.ndarray) -> tuple[list[str], Tensor]:
    """Distinct captions of these images, C, and which are whose: bool (N, C)."""
    row_of_image = np.full(source.num_images, -1)
    row_of_image[images] = np.arange(len(images))
    pairs = np.flatnonzero(row_of_image[source.pair_image] >= 0)
    groups, first, group_of_pair = np.unique(source.pair_group[pairs], return_index=True, return_inverse=True)
    relevant = torch.zeros(len(images), len(groups), dtype=torch.bool)
    relevant[row_of_image[source.pair_image[pairs]], group_of_pair] = True
    return [source.caption(int(pairs[i])) for i in first], relevant


def _encode_texts(
    model: SCLNetwork, tokenizer: CaptionTokenizer, captions: list[str], batch_size: int, batches: _Batches
) -> tuple[Tensor, Tensor]:
    """Tokens (C, L, width) of captions and their mask (C, L)."""
    device = next(model.parameters()).device
    ids, mask = (x.to(device) for x in tokenizer(captions, model.config.max_text_len))
    mask = mask.bool()
    own = {number: model.encode_text(ids[rows], mask[rows]) for number, rows in batches.own(len(captions), batch_size)}
    return batches.joined(own), mask


def _gallery(model: SCLNetwork, image: VisionFeatures, text: Tensor, text_mask: Tensor, relevant: Tensor) -> _Gallery:
    # Every rank computes all similarities: cut into parts, a matrix product rounds in other places.
    projected = model.project(first_token(text, text_mask), image.cls)
    text_feature, image_feature = (torch.nn.functional.normalize(x.float(), dim=-1) for x in projected)
    return _Gallery(image, text, text_mask, image_feature @ text_feature.T, relevant.to(text.device))


def _rerank(
    model: SCLNetwork,
    gallery: _Gallery,
    scores: Tensor,
    by_image: bool,
    count: int,
    batch_size: int,
    batches: _Batches,
) -> Tensor:
    """Scores (Q, N) whose ``count`` best candidates a query are ordered by the matching head, before all others."""
    candidates = scores.topk(min(count, scores.shape[1]), dim=1).indices
    queries = torch.arange(len(scores), device=scores.device)[:, None].expand_as(candidates)
    images, texts = (queries, candidates) if by_image else (candidates, queries)
    matching = _match(model, gallery, images.flatten(), texts.flatten(), batch_size, batches)
    # The others stay behind the candidates in the order of their similarity, which is within [-1, 1].
    behind = scores - 3 + matching.min()
    return behind.scatter(1, candidates, matching.view_as(candidates))


def _match(
    model: SCLNetwork, gallery: _Gallery, images: Tensor, texts: Tensor, batch_size: int, batches: _Batches
) -> Tensor:
    """Logit of "matches" minus logit of "does not match" of pairs of gallery rows: (pairs,) float32."""
    logits: dict[int, Tensor] = {}
    for number, rows in batches.own(len(images), batch_size):
        image = gallery.image.with_tokens(gallery.image.tokens[images[rows]])
        text = texts[rows]
        fused = model.run_fusion(gallery.text[text], gallery.text_mask[text], image)
        logits[number] = model.itm_head(model.pool(*fused.cls)).float()
    logit = batches.joined(logits)
    return logit[:, 1] - logit[:, 0]
