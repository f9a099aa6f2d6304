"""Image-text retrieval: the network that ranks, and what its tasks share.

A picture's caption is ranked among captions of other pictures, and pictures and captions are contrasted before fusion,
as in SCL (compute_irtr). Recall comes from the contrast, and from the ranking head that orders its best candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sclkern.data.digest import digest
from sclkern.data.source import PairSource, has_clips, image_ids, open_pairs
from sclkern.distributed import gather
from sclkern.errors import UserError
from sclkern.models.captions import first_token
from sclkern.step.dropout import BatchKeys
from sclkern.tasks.model import TaskModel, right_share
from sclkern.tasks.task import Evaluator, Outcome, Sample, Task

# Captions of other pictures that a picture's own is ranked among, as published.
FALSE_TEXTS = 15


class RankingModel(TaskModel):
    """Ranks captions of a picture by the head ``rank``, which begins as the matching head's logit of "matches"."""

    loss_name = "ranking"
    # Of the contrast, as published.
    contrast_weight: float = 0.5

    def loss(self, batch: Mapping[str, Any], keys: BatchKeys | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the own caption among T, and the contrast of all pictures with all captions.

        ``image_id`` (B,) and ``text_image`` (T * B,) say which pictures are the same, and whose the captions are.
        """
        rows = len(batch["image"])
        count = len(batch["text_ids"]) // rows
        texts = self.encode_texts(batch["text_ids"], batch["text_mask"], keys, range(count))
        image = self.encode_image(batch["image"])
        pooled = self.fuse(texts, image.with_tokens(image.tokens.repeat(count, 1, 1)), keys, range(count))
        scores = self.scores(self.rank_head, pooled).float().view(count, rows).T
        own = scores.new_zeros(rows, dtype=torch.int64)
        ranking = F.cross_entropy(scores, own)
        projected = self.project(first_token(texts.tokens, texts.mask), image.cls)
        with torch.autocast(scores.device.type, enabled=False):
            contrast = self._contrast(*projected, batch)
        metrics = {"ranking_loss": ranking, "contrast_loss": contrast, "ranked_first": right_share(scores, own)}
        return ranking + self.contrast_weight * contrast, {name: value.detach() for name, value in metrics.items()}

    def _contrast(self, text: Tensor, image: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The contrast over the captions and pictures of all processes, the mean of both directions.

        Other captions of the same picture, and the same picture in another row, are no negatives.
        """
        rows, texts = len(image), len(text)
        image, text = (gather(F.normalize(x.float(), dim=-1)) for x in (image, text))
        of_image, of_text = (gather(batch[name]) for name in ("image_id", "text_image"))
        row = torch.arange(len(image), device=image.device)
        own = row // rows * texts + row % rows
        logits = image @ text.T / self.contrast_temperature()
        same = of_image[:, None] == of_text
        others = same.scatter(1, own[:, None], False)
        to_text = F.cross_entropy(logits.masked_fill(others, -torch.inf), own)
        others = (of_image == of_image[:, None]).fill_diagonal_(False)
        to_image = F.cross_entropy(logits[:, own].T.masked_fill(others, -torch.inf), row)
        return (to_text + to_image) / 2

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """The score of each caption of a batch, (B, T) float32."""
        rows = len(batch["image"])
        count = len(batch["text_ids"]) // rows
        texts, image = self.encode_texts(batch["text_ids"], batch["text_mask"]), self.encode_image(batch["image"])
        pooled = self.fuse(texts, image.with_tokens(image.tokens.repeat(count, 1, 1)))
        return self.scores(self.rank_head, pooled).float().view(count, rows).T


class ClipRankingModel(RankingModel):
    """Ranks captions of a clip."""

    contrast_weight = 1.0


class CaptionTable:
    """Captions of pictures or clips as samples of a task, over any source of pairs.

    Args:
        pairs: the pictures and their captions.

    Attributes:
        pairs: as given.
        num_samples: number of captions.
        num_images: number of pictures.
        digest: of the captions.
    """

    pairs: PairSource
    num_samples: int
    num_images: int
    digest: str

    def __init__(self, pairs: PairSource) -> None:
        self.pairs = pairs
        self.num_samples, self.num_images = pairs.num_pairs, pairs.num_images
        self.digest = digest(pairs)
        if hasattr(pairs, "image_bytes"):
            self.image_bytes = pairs.image_bytes
        if has_clips(pairs):
            self.frames = pairs.frames

    def image(self, image: int) -> Image.Image:
        """A picture, mode RGB."""
        return self.pairs.image(image)

    def image_name(self, image: int) -> str:
        """Where a picture comes from, for messages."""
        return self.pairs.image_name(image)

    def picture(self, pair: int) -> int:
        """The picture that a pair shows, the same for all that show it."""
        return int(image_ids(self.pairs, self.pairs.pair_image[pair]))

    def false_pairs(self, pair: int, count: int) -> list[int]:
        """Pairs of other pictures and with another caption, drawn from torch's default generator, each once."""
        own, group = self.picture(pair), self.pairs.pair_group
        drawn: dict[int, None] = {}
        # Beyond so many draws the data have too few others, which the task has checked.
        for other in torch.randint(self.num_samples, (64 * count,)).tolist():
            if self.picture(other) != own and group[other] != group[pair]:
                drawn[other] = None
            if len(drawn) == count:
                break
        return list(drawn)


class CaptionRetrieval(Task):
    """Retrieval of captions by pictures and of pictures by captions."""

    # Whether of clips.
    clips: bool = False
    model = RankingModel
    heads = ("itc", "rank")
    zero_shot = ("itc", "itm")
    metric = "rsum"

    def open(self, root: str | Path, tables: Sequence[str]) -> CaptionTable:
        """Open tables of pictures with captions."""
        pairs = open_pairs(root, tables, format="arrow")
        if has_clips(pairs) != self.clips:
            kinds = ("pictures", "clips") if self.clips else ("clips", "pictures")
            raise UserError(
                f"{', '.join(tables)}: got {kinds[0]}, expected {kinds[1]}; sclkern data convert {self.name} writes "
                "them"
            )
        return CaptionTable(pairs)

    def check_training(self, source: CaptionTable) -> None:
        """There must be enough captions of other pictures."""
        counts = np.bincount(source.pairs.pair_image)
        groups = len(np.unique(source.pairs.pair_group))
        others = min(source.num_samples - int(counts.max()), groups - 1)
        if others < 2 * FALSE_TEXTS:
            raise UserError(
                f"data.train_tables: {others} captions of other pictures than a picture's own, expected "
                f"{2 * FALSE_TEXTS} or more, of which {FALSE_TEXTS} are drawn; use more data"
            )

    def sample(self, source: CaptionTable, number: int) -> Sample:
        """A picture with its caption, and captions of others; the target are their pictures, the own one first."""
        false = source.false_pairs(number, FALSE_TEXTS)
        pairs = [number, *false]
        texts = tuple(source.pairs.caption(pair) for pair in pairs)
        return Sample((int(source.pairs.pair_image[number]),), texts, [source.picture(pair) for pair in pairs])

    def collate(self, source: CaptionTable, targets: list[list[int]]) -> dict[str, Tensor]:
        """``image_id`` (B,), and ``text_image`` (T * B,) in the order of the texts."""
        pictures = torch.tensor(targets)
        return {"image_id": pictures[:, 0].clone(), "text_image": pictures.T.flatten()}

    def measure(self, source: CaptionTable, predictions: Tensor) -> Outcome:
        """Not of captions one by one: recall is of all pairs."""
        raise NotImplementedError

    def evaluate(
        self, source: CaptionTable, model: TaskModel, evaluator: Evaluator, *, annotations: Path | None = None
    ) -> Outcome:
        """Recalls and ranks of the contrast ("itc"), the ranking head ("rank") and chance, and the head's ``rsum``.

        The ranking head orders the best ``task.rerank`` candidates of the contrast.
        """
        self.refuse(annotations)
        found = evaluator.retrieve(model, source.pairs)
        return Outcome({**found.recalls, **found.ranks, "rsum": found.sum})


class ClipRetrieval(CaptionRetrieval):
    """Retrieval of captions by clips and of clips by captions."""

    clips = True
    model = ClipRankingModel
