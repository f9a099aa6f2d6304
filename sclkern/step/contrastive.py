"""The contrastive batch: losses that see every pair of an accumulated batch over all ranks, with exact gradients.

Each micro-batch is taken twice, as GradCache does it (Gao et al., arXiv 2101.06983). First the features that are
contrasted are computed without gradient, and only what they need. One evaluation of the losses over all of them gives
their values, and the gradients of the features and of the temperature. Then each micro-batch is taken with gradient,
where the inner product of features and cached gradients stands for these losses. Masks and dropout are keyed by the
place of a row in the global batch, so both passes have the same and nothing is replayed::

    with autocast:
        contrasts = contrast_batch(model, batches, seed)
    counts = target_counts(model.config, model.objectives, batches, seed)
    for number, (batch, contrast) in enumerate(zip(batches, contrasts)):
        with nullcontext() if number == len(batches) - 1 else ddp.no_sync():
            with autocast:
                losses = ddp(batch, seed=seed, counts=counts, contrast=contrast)
            (losses.total / len(batches)).backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sclkern.distributed import world_size
from sclkern.models.config import SCLConfig
from sclkern.objectives import LossOutput, Objective, ObjectiveConfig
from sclkern.step.losses import Contrast
from sclkern.step.masks import token_capacity

# Rows of one contrast: above it the similarities of all tokens would cost more than the encoders.
MAX_ROWS = 2**17


class ContrastiveModel(Protocol):
    """What ``contrast_batch`` takes of a ``sclkern.SCLModel``."""

    config: SCLConfig
    objectives: ObjectiveConfig

    @property
    def backend(self) -> str:
        """Of the ops."""

    def contrast_features(
        self, batch: Mapping[str, Any], *, seed: int | Tensor, names: tuple[str, ...]
    ) -> dict[str, Mapping[str, Tensor]]:
        """Features of some objectives."""


def contrasted_objectives(
    config: SCLConfig, objectives: ObjectiveConfig, global_batch: int, num_frames: int = 1
) -> tuple[str, ...]:
    """The objectives of a recipe that see the whole contrastive batch.

    The others see the pairs of a micro-batch over all ranks: those that give no ``Objective.features``, and those that
    compare every token with every other and have too many in such a batch.

    Args:
        config: of the network.
        objectives: the recipe.
        global_batch: rows of all micro-batches over all ranks.
        num_frames: of clips; 1 for images.

    Returns:
        Names, in the order of the recipe.
    """
    tokens = token_capacity(config, objectives, config.max_text_len)
    tokens["replaced"] *= num_frames

    def fits(objective: Objective) -> bool:
        rows = max((tokens[kind] for kind in objective.contrast_tokens), default=1)
        return objective.contrast is not None and rows * global_batch <= MAX_ROWS

    return tuple(objective.name for objective in objectives.selected if fits(objective))


def contrast_batch(
    model: ContrastiveModel,
    batches: Iterable[Mapping[str, Any]],
    seed: int | Tensor,
    *,
    copied: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> list[Contrast]:
    """Compute the contrastive losses of all micro-batches over all ranks, and the gradients of their features.

    Every rank must call it, with micro-batches of the same number of rows. Enter autocast around it as around the
    model.

    Args:
        model: the ``SCLModel``, not its wrapper.
        batches: the micro-batches of this rank, each as ``SCLModel.forward`` takes it, with ``place``.
        seed: of the step.
        copied: copies a micro-batch to the device of the model when it is its turn, so that the device holds one at a
            time; None: they are there.

    Returns:
        For each micro-batch what ``SCLModel.forward`` takes as ``contrast``.

    Raises:
        ValueError: no micro-batch, or one that no step takes.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches: got none, expected one micro-batch or more")
    image = batches[0]["image"]
    rows = sum(len(batch["image"]) for batch in batches) * world_size()
    names = contrasted_objectives(model.config, model.objectives, rows, image.shape[1] if image.ndim == 5 else 1)
    if not names or len(batches) == 1:
        # One micro-batch sees its pairs over all ranks in any case.
        return [Contrast({}, {}) for _ in batches]
    with torch.no_grad():
        features = [
            model.contrast_features(copied(batch) if copied else batch, seed=seed, names=names) for batch in batches
        ]
    selected = [objective for objective in model.objectives.selected if objective.name in names]
    evaluated = {
        objective.name: _evaluate(objective, [part[objective.name] for part in features], model)
        for objective in selected
    }
    outputs = {name: output for name, (output, _) in evaluated.items()}
    return [
        Contrast(outputs, {name: gradients[number] for name, (_, gradients) in evaluated.items()})
        for number in range(len(batches))
    ]


def _evaluate(
    objective: Objective, features: list[Mapping[str, Tensor]], model: ContrastiveModel
) -> tuple[LossOutput, list[dict[str, Tensor]]]:
    """The loss of all features, and the gradients of those of each micro-batch."""
    assert objective.contrast is not None  # it is one of ``contrasted_objectives``
    leaves = {name: _joined([part[name] for part in features]).detach() for name in features[0]}
    with torch.enable_grad():
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        loss, metrics = objective.contrast(leaves, model.objectives, model.backend)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    gradients: list[dict[str, Tensor]] = [{} for _ in features]
    for name, gradient in zip(wanted, found, strict=True):
        if gradient is None:
            continue
        sizes = [part[name].shape[0] for part in features] if gradient.ndim else []
        # The mean over micro-batches divides: what belongs to one of them must not shrink by it.
        parts = (gradient * len(features)).split(sizes) if gradient.ndim else [gradient] * len(features)
        for of_batch, part in zip(gradients, parts, strict=True):
            of_batch[name] = part
    return LossOutput(loss.detach(), metrics), gradients


def _joined(parts: list[Tensor]) -> Tensor:
    """The rows of all micro-batches; of tokens, with the same room in each. A parameter is the same in all."""
    if not parts[0].ndim:
        return parts[0]
    return torch.cat(parts)
