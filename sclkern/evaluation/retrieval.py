"""Zero-shot retrieval: recall at 1, 5 and 10 by the image-text contrast, and re-ranked by image-text matching.

Captions are scored by group: pictures that share a caption are all right answers to it, and each distinct caption is
one candidate. With one caption of its own for each picture this is the usual protocol.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sclkern.data import PairSource
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.undecodable import UndecodableImages
from sclkern.models import SCLNetwork, VisionFeatures

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalResult:
    """Recalls as fractions under keys such as "itc_text_to_image_r1"; ``chance_*`` are those of a random order.

    Attributes:
        images, captions: size of the galleries.
    """

    images: int
    captions: int
    recalls: dict[str, float]

    @property
    def sum(self) -> float:
        """Sum of the best method's six recalls, by which the best checkpoint is chosen."""
        method = "itm" if "itm_image_to_text_r1" in self.recalls else "itc"
        return sum(value for key, value in self.recalls.items() if key.startswith(method))


def recalls(scores: Tensor, relevant: Tensor) -> dict[str, float]:
    """Share of the rows of ``scores`` (Q, N) with a relevant one (bool (Q, N)) among the K highest."""
    depth = min(max(RECALL_AT), scores.shape[1])
    hits = relevant.gather(1, scores.topk(depth, dim=1).indices)
    return {f"r{k}": hits[:, :k].any(1).float().mean().item() for k in RECALL_AT}


def chance_recalls(relevant: Tensor) -> dict[str, float]:
    """Expected recalls of a random order: 1 - C(N - r, K) / C(N, K) for a row with r relevant of N."""
    total = relevant.shape[1]
    counts = relevant.sum(1).tolist()
    return {
        f"r{k}": sum(1 - math.comb(total - r, min(k, total)) / math.comb(total, min(k, total)) for r in counts)
        / len(counts)
        for k in RECALL_AT
    }


@torch.no_grad()
def evaluate_retrieval(
    model: SCLNetwork,
    table: PairSource,
    tokenizer: CaptionTokenizer,
    transform,
    *,
    batch_size: int = 64,
    rerank: int = 16,
    max_images: int | None = None,
    bad_pictures: UndecodableImages | None = None,
) -> RetrievalResult:
    """Recall in both directions over the pictures of a table.

    Args:
        transform: PIL image to (3, S, S).
        rerank: candidates of the contrast that the matching head re-ranks, in each direction; 0 = none.
        max_images: so many pictures, spread evenly over the table; None = all.
        bad_pictures: counts the undecodable pictures, which are left out.

    Raises:
        UserError: too many pictures are undecodable.

    Every decoded picture and every encoded token is held at once, the tokens on the model's device.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    bad_pictures = bad_pictures if bad_pictures is not None else UndecodableImages(table.num_images)
    pixels, kept = _decode(table, transform, max_images, bad_pictures)
    of_image = np.full(table.num_images, -1)
    of_image[kept] = np.arange(len(kept))
    pairs = np.flatnonzero(of_image[table.pair_image] >= 0)
    groups, first, group_of = np.unique(table.pair_group[pairs], return_index=True, return_inverse=True)
    relevant = torch.zeros(len(kept), len(groups), dtype=torch.bool)
    relevant[of_image[table.pair_image[pairs]], group_of] = True

    captions = [table.caption(int(pairs[i])) for i in first]
    ids, mask = tokenizer(captions, model.config.max_text_len)
    texts = [
        model.encode_text(i.to(device), m.to(device))
        for i, m in zip(ids.split(batch_size), mask.split(batch_size), strict=True)
    ]
    images = [model.encode_image(batch.to(device)) for batch in pixels.split(batch_size)]
    text, mask = torch.cat(texts), mask.to(device)
    image = VisionFeatures(torch.cat([x.tokens for x in images]), images[0].num_frames)
    projected = model.project(text[:, 0], image.cls)
    text_feature, image_feature = (torch.nn.functional.normalize(x.float(), dim=-1) for x in projected)
    similarity = image_feature @ text_feature.T
    relevant = relevant.to(device)

    out: dict[str, float] = {}
    directions = {"image_to_text": (similarity, relevant), "text_to_image": (similarity.T, relevant.T)}
    for direction, (scores, answers) in directions.items():
        named = {"itc": recalls(scores, answers), "chance": chance_recalls(answers)}
        if rerank:
            candidates = scores.topk(min(rerank, scores.shape[1]), dim=1).indices
            rows = torch.arange(len(scores), device=device)[:, None].expand_as(candidates)
            by_image = (rows, candidates) if direction == "image_to_text" else (candidates, rows)
            matching = _match(model, image, text, mask, *(x.flatten() for x in by_image), batch_size=4 * batch_size)
            # The others stay behind the candidates, in the order of the contrast, whose scores are within [-1, 1].
            behind = scores - 3 + matching.min()
            matched = behind.scatter(1, candidates, matching.view_as(candidates))
            named["itm"] = recalls(matched, answers)
        out |= {f"{method}_{direction}_{k}": value for method, values in named.items() for k, value in values.items()}
    model.train(was_training)
    return RetrievalResult(len(kept), len(groups), out)


def _match(
    model: SCLNetwork,
    image: VisionFeatures,
    text: Tensor,
    mask: Tensor,
    images: Tensor,
    texts: Tensor,
    *,
    batch_size: int,
) -> Tensor:
    """Logit of "belongs together" over "does not" for pairs of rows: (pairs,) float32."""
    logits = []
    for i, t in zip(images.split(batch_size), texts.split(batch_size), strict=True):
        fused = model.run_fusion(text[t], mask[t], image.with_tokens(image.tokens[i]))
        logits.append(model.itm_head(model.pool(*fused.cls)).float())
    logit = torch.cat(logits)
    return logit[:, 1] - logit[:, 0]


def _decode(
    table: PairSource, transform, max_images: int | None, bad_pictures: UndecodableImages
) -> tuple[Tensor, np.ndarray]:
    pixels, kept = [], []
    count = min(table.num_images, max_images or table.num_images)
    for index in np.linspace(0, table.num_images - 1, count).round().astype(int).tolist():
        try:
            pixels.append(transform(table.image(index)))
        except ValueError:
            bad_pictures.add([table.image_name(index)])
            continue
        kept.append(index)
    return torch.stack(pixels), np.array(kept)
