"""SCLModel: a network with its objectives and its training step, loaded from files and saved to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sclkern import weights
from sclkern.models.config import SCLConfig
from sclkern.models.network import SCLNetwork
from sclkern.objectives import ObjectiveConfig, contrast_temperature
from sclkern.step import Contrast, SCLLosses, StepConfig, take_features, take_step


class SCLModel(SCLNetwork):
    """Vision-language model of SCL: ``forward`` returns the losses of one training step.

    >>> model = SCLModel(SCLConfig.preset("tiny"))
    >>> losses = model({"image": images, "text_ids": ids, "text_mask": mask}, seed=0)
    >>> losses.total.backward()

    Args:
        config: the sizes, and which heads exist.
        objectives: which losses are computed and how; None takes the defaults of ``ObjectiveConfig``.
        step: how a step is executed; None takes the defaults of ``StepConfig``.

    Attributes:
        load_report: what became of the checkpoint's tensors; only after ``from_pretrained`` and ``from_reference``.
    """

    load_report: weights.LoadReport

    def __init__(
        self, config: SCLConfig, objectives: ObjectiveConfig | None = None, step: StepConfig | None = None
    ) -> None:
        super().__init__(config)
        self.objectives = objectives or ObjectiveConfig()
        self.step = step or StepConfig()

    @property
    def step(self) -> StepConfig:
        """How a step is executed; may be replaced at any time."""
        return self._step

    @step.setter
    def step(self, step: StepConfig) -> None:
        self._step = step
        self.execution.absorb = step.absorb
        self.execution.checkpoint_blocks = step.checkpoint_blocks

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | tuple[str | Path, str | Path],
        *,
        objectives: ObjectiveConfig | None = None,
        step: StepConfig | None = None,
        **options: Any,
    ) -> Self:
        """Load a directory of ``save_pretrained``, or build on a pair of encoders.

        Args:
            path: the directory, or a pair (text, vision); see ``sclkern.weights.from_pretrained``.
            objectives: as in ``SCLModel``.
            step: as in ``SCLModel``.
            **options: ``strict``, ``config`` and changes of ``SCLConfig``; see ``sclkern.weights.from_pretrained``.

        Returns:
            The model, in float32 on the CPU, in training mode, with a ``LoadReport`` as ``load_report``.

        Raises:
            UserError: the source cannot be read, is of another architecture, or (``strict``) lacks tensors or has
                unexpected ones.
        """
        model, report = weights.from_pretrained(lambda config: cls(config, objectives, step), path, **options)
        model.load_report = report
        return model

    @classmethod
    def from_reference(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        objectives: ObjectiveConfig | None = None,
        step: StepConfig | None = None,
        **options: Any,
    ) -> Self:
        """Load weights under the names of SCL's or METER's published code.

        Args:
            source: a checkpoint, or its tensors by name; see ``sclkern.weights.from_reference``.
            objectives: as in ``SCLModel``.
            step: as in ``SCLModel``.
            **options: ``strict``, ``config`` and changes of ``SCLConfig``; see ``sclkern.weights.from_reference``.

        Returns:
            The model, in float32 on the CPU, in training mode, with a ``LoadReport`` as ``load_report``.

        Raises:
            UserError: the source cannot be read, is no such checkpoint, or (``strict``) lacks tensors or has
                unexpected ones.
        """
        model, report = weights.from_reference(lambda config: cls(config, objectives, step), source, **options)
        model.load_report = report
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a directory, each whole or not at all.

        Args:
            path: the directory; made where it does not exist.

        Raises:
            UserError: weights that could not be loaded again, or the operating system refused.
        """
        weights.save_pretrained(self, path)

    def contrast_temperature(self) -> Tensor:
        """Temperature of the image-text contrast, clamped unless the objectives say "published"."""
        return contrast_temperature(self.temperature, self.objectives)

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        seed: int | Tensor | None = None,
        counts: Mapping[str, Tensor] | None = None,
        contrast: Contrast | None = None,
    ) -> SCLLosses:
        """Compute one training step's losses; every mask is drawn on the batch's device.

        With ``place``, masks and dropout of a row depend on ``seed`` and its place alone, so that a global batch may be
        cut into micro-batches and ranks in any way; see ``docs/step.md``.

        Args:
            batch: ``image`` (B, 3, S, S) or (B, F, 3, S, S) float; ``text_ids`` (B, L) int64; ``text_mask`` (B, L)
                bool or 0/1, True or 1 = a token, with padding anywhere; ``false_image``, like ``image``, when
                ``itm_negatives`` is "dataset"; optionally ``text_tokens``, an int at least the number of tokens in
                ``text_mask``: the texts are packed into that many tokens (without it into all B * L), and ``image_id``
                (B,) int64, equal where rows show the same picture (without it each shows its own). Of a part of a
                global batch also ``place`` (B,) int64, of each row in it; with that ``match_labels`` (B,) int64, 1 for
                the row's own image in ITM and 0 for a false one, ``false_image`` with one row for each label 0, and
                ``false_place``, int64 for each label 0, whose image is taken where there is no ``false_image``.
            seed: int or int64 tensor, the key of every mask; None draws one from torch's generator.
            counts: of ``sclkern.step.target_counts``: MLM and MLTC divide by the targets of the global batch; None
                divides by those of this batch.
            contrast: of ``sclkern.step.contrast_batch``: contrastive losses see the whole global batch; None sees this
                batch over all ranks.

        Returns:
            The losses, with their graph.

        Raises:
            UserError: the network lacks a head or a mask token that an objective needs.
            TypeError: see ``sclkern.step.check_step``.
            ValueError: a batch that no step takes; see ``sclkern.step.check_step``. What would have to be read from a
                GPU makes the losses NaN there.
        """
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        return take_step(self, self.objectives, self.step, batch, seed, counts=counts, contrast=contrast)

    def contrast_features(
        self, batch: Mapping[str, Any], *, seed: int | Tensor, names: tuple[str, ...]
    ) -> dict[str, Mapping[str, Tensor]]:
        """Compute what some objectives contrast: the first pass of a contrastive batch.

        Args:
            batch: as in ``forward``, with ``place``.
            seed: as in ``forward``.
            names: of the objectives; see ``sclkern.step.contrasted_objectives``.

        Returns:
            Features by objective and name.

        Raises:
            UserError: as ``forward``.
            TypeError: as ``forward``.
            ValueError: as ``forward``; or the batch has no places.
        """
        return take_features(self, self.objectives, self.step, batch, seed, names)
