"""The network of a task: SCL's encoders and fusion encoder, with the head of the task and its loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sclkern.model import SCLModel
from sclkern.models.captions import check_captions, first_token
from sclkern.models.config import SCLConfig
from sclkern.models.layouts import Padded
from sclkern.models.network import IMAGE_TYPE, TEXT_TYPE
from sclkern.models.vision import VisionFeatures
from sclkern.objectives import ObjectiveConfig
from sclkern.random import module_seeds, one_seed_draw
from sclkern.step import Contrast, SCLLosses, StepConfig
from sclkern.step.dropout import BatchKeys


class Texts(NamedTuple):
    """Encoded texts.

    Attributes:
        tokens: (B, L, D), after the modality transform.
        mask: (B, L) bool, True = a token.
    """

    tokens: Tensor
    mask: Tensor


class TaskModel(SCLModel):
    """A network that answers a task; ``forward`` returns its loss, ``predict`` its answers.

    Args:
        config: with the heads of the task, and no others.
        objectives: of pre-training, which a task has not; its loss is ``loss``.
        step: how the network is executed.

    Attributes:
        loss_name: in logs.
    """

    loss_name: str

    def __init__(
        self, config: SCLConfig, objectives: ObjectiveConfig | None = None, step: StepConfig | None = None
    ) -> None:
        # Of the recipes, one that counts no tokens over the processes.
        super().__init__(config, objectives or ObjectiveConfig(recipe=("itm",)), step)

    @abstractmethod
    def loss(self, batch: Mapping[str, Any], keys: BatchKeys | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            batch: of ``TaskBatches``, on the device.
            keys: of dropout; None draws by where tokens lie, or nothing.

        Returns:
            0-d loss, whose mean over equal parts of a batch is that of the batch; and detached 0-d metrics by name.
        """

    @abstractmethod
    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """Answers to a batch, (B, ...)."""

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        seed: int | Tensor | None = None,
        counts: Mapping[str, Tensor] | None = None,
        contrast: Contrast | None = None,
    ) -> SCLLosses:
        """The loss of a batch of ``TaskBatches``; dropout follows from ``seed`` and the ``place`` of each row alone.

        Args:
            batch: on the device.
            seed: of the step.
            counts: of pre-training; not read.
            contrast: of pre-training; not read.

        Returns:
            The loss, as ``total`` and under its name.
        """
        keys = None
        if self.training and self.config.dropout > 0 and "place" in batch and seed is not None:
            place = batch["place"]
            keys = BatchKeys(place, module_seeds(seed, self.dropout_modules, place.device))
        with self.weights_cast(), one_seed_draw():
            loss, metrics = self.loss(batch, keys)
        return SCLLosses(loss, {self.loss_name: loss}, metrics)

    def encode_texts(
        self, ids: Tensor, mask: Tensor, keys: BatchKeys | None = None, numbers: Sequence[int] = (0,)
    ) -> Texts:
        """``encode_text`` with dropout by place.

        Args:
            ids: (B, L) int64; of several texts a row, the first of each row, then the second of each.
            mask: (B, L) bool.
            keys: of dropout.
            numbers: that tell the texts of a row apart.

        Returns:
            The texts.
        """
        mask = check_captions(ids, mask, self.config).mask
        layout = Padded(mask, keys=None if keys is None else keys.padded(numbers, ids.shape[1]))
        return Texts(self.text_transform(self.text.encode(ids, self.text.positions(ids, mask), layout)), mask)

    def fuse(
        self,
        texts: Texts,
        image: VisionFeatures,
        keys: BatchKeys | None = None,
        numbers: Sequence[int] = (0,),
        *,
        image_type: int = IMAGE_TYPE,
    ) -> Tensor:
        """The pooled features of fused pairs.

        Args:
            texts: of ``encode_texts``.
            image: of ``encode_image``, a row for each text.
            keys: of dropout.
            numbers: that tell the pairs of a row apart.
            image_type: as in ``run_fusion``.

        Returns:
            (B, 2 D).
        """
        text_keys = image_keys = None
        if keys is not None:
            text_keys, image_keys = (keys.padded(numbers, x.shape[1]) for x in (texts.tokens, image.tokens))
        text, fused = self.fusion(
            texts.tokens + self.modality.weight[TEXT_TYPE],
            Padded(texts.mask, keys=text_keys),
            image.tokens + self.modality.weight[image_type],
            Padded(keys=image_keys),
        )
        return self.pool(first_token(text, texts.mask), image.with_tokens(fused).cls)

    def scores(self, head: nn.Module, pooled: Tensor) -> Tensor:
        """What a head says of pooled pairs, in the dtype of its weights, so that near scores do not tie.

        Args:
            head: of the network.
            pooled: of ``fuse``.

        Returns:
            (B, ...).
        """
        with torch.autocast(pooled.device.type, enabled=False):
            scores: Tensor = head(pooled.to(next(head.parameters()).dtype))
        return scores


@torch.no_grad()
def right_share(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is that of their label, 0-d float32, on their device."""
    return (logits.argmax(-1) == labels).float().mean()
