"""NLVR2: whether a sentence is true of two pictures.

Recipe, head and loss are those of METER and SCL: the sentence is fused with either picture, the second one under a
token type of its own, and an MLP reads both pooled pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sclkern.models.network import IMAGE_TYPE
from sclkern.objectives.downstream import visual_reasoning
from sclkern.step.dropout import BatchKeys
from sclkern.tasks.model import TaskModel, right_share
from sclkern.tasks.nlvr2 import accuracy, consistency
from sclkern.tasks.tables import QuestionTable
from sclkern.tasks.task import Outcome, Recipes, Sample, Task, register_task

SPLITS = {
    split: (f"nlvr2_{split}",)
    for split in (
        "train", "dev", "test1", "balanced_dev", "balanced_test1", "unbalanced_dev", "unbalanced_test1",
    )
} | {"val": ("nlvr2_dev",)}  # fmt: skip
_OPTIMIZER = {"learning_rate": 1e-5, "head_factor": 10.0, "fusion_factor": 10.0, "warmup": 0.1}
_DATA = {"train_tables": ["nlvr2_train"], "transform": "clip_randaug"}
_TASK = {"epochs": 10.0, "global_batch": 256}
RECIPES: Recipes = {
    "default": {
        "data": {**_DATA, "val_tables": ["nlvr2_dev"]},
        "optimizer": _OPTIMIZER,
        "run": {"output_dir": "runs/nlvr2"},
        "task": _TASK,
    },
    # The published code selects by dev and by the test split.
    "published": {
        "model": {"image_size": 288},
        "data": {**_DATA, "val_tables": ["nlvr2_dev", "nlvr2_test1"], "decoding": "published"},
        "optimizer": {**_OPTIMIZER, "no_decay": "published"},
        "run": {"output_dir": "runs/nlvr2_published"},
        "task": _TASK,
    },
}


class ReasoningModel(TaskModel):
    """Tells true sentences by the head ``nlvr2``."""

    loss_name = "nlvr2"

    def loss(self, batch: Mapping[str, Any], keys: BatchKeys | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy on ``labels`` (B,), 1 where the sentence is true."""
        logits = self._logits(batch, keys)
        return visual_reasoning(logits, batch["labels"]), {"accuracy": right_share(logits, batch["labels"])}

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """1 where the sentence is taken to be true, (B,) int64."""
        return self._logits(batch).argmax(1)

    def _logits(self, batch: Mapping[str, Any], keys: BatchKeys | None = None) -> Tensor:
        texts = self.encode_texts(batch["text_ids"], batch["text_mask"], keys)
        # Both pictures of every row in one run of the encoder, the first ones first.
        both = self.encode_image(batch["image"].transpose(0, 1).flatten(0, 1))
        pairs = [
            self.fuse(texts, both.with_tokens(tokens), keys, (side,), image_type=IMAGE_TYPE + side)
            for side, tokens in enumerate(both.tokens.chunk(2))
        ]
        return self.scores(self.nlvr2_head, torch.cat(pairs, dim=-1))


class SentenceTable(QuestionTable):
    """Sentences on two pictures; the arguments are those of ``QuestionTable``.

    Args:
        root: as in ``QuestionTable``.
        tables: as in ``QuestionTable``.
    """

    def __init__(self, root: str | Path, tables: Sequence[str]) -> None:
        super().__init__(root, tables, pictures=("image_0", "image_1"), columns=("answers", "identifier"), set="nlvr2")

    def is_true(self, sample: int) -> bool:
        """Whether a sentence is true."""
        return bool(self.item("answers", sample) == "True")

    def sentence(self, sample: int) -> tuple[str, str]:
        """What tells a sentence from all others that are not said of its set of pictures."""
        return str(self.of_row("identifier", sample)).rpartition("-")[0], self.text(sample)


@register_task
class Nlvr2(Task):
    """Reasoning on two pictures."""

    name = "nlvr2"
    title = "reasoning on two pictures (NLVR2)"
    model = ReasoningModel
    heads = ("nlvr2",)
    splits = SPLITS
    metric = "accuracy"
    recipes = RECIPES

    def open(self, root: str | Path, tables: Sequence[str]) -> SentenceTable:
        """Open tables of sentences."""
        return SentenceTable(root, tables)

    def sample(self, source: SentenceTable, number: int) -> Sample:
        """Two pictures and a sentence; the target is 1 where it is true."""
        return Sample(source.images_of(number), (source.text(number),), int(source.is_true(number)))

    def collate(self, source: SentenceTable, targets: list[int]) -> dict[str, Tensor]:
        """``labels`` (B,) int64."""
        return {"labels": torch.tensor(targets)}

    def measure(self, source: SentenceTable, predictions: Tensor) -> Outcome:
        """``accuracy``, and ``consistency`` over the sentences that are said of several pairs."""
        said, samples = predictions.tolist(), range(source.num_samples)
        labels = [source.is_true(sample) for sample in samples]
        sentences = [source.sentence(sample) for sample in samples]
        return Outcome({"accuracy": accuracy(said, labels), "consistency": consistency(said, labels, sentences)})
