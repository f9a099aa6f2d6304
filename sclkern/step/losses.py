"""The losses of a step: encode, fuse, and run every objective of the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sclkern.distributed import Group, total, world_size
from sclkern.errors import UserError
from sclkern.models.config import SCLConfig
from sclkern.models.network import SCLNetwork
from sclkern.objectives import OBJECTIVES, LossInputs, LossOutput, Objective, ObjectiveConfig
from sclkern.objectives._common import at_least_float32
from sclkern.objectives.itc import text_to_image_similarity
from sclkern.profiling import phase
from sclkern.random import one_seed_draw
from sclkern.step.batch import brings_false_images, prepare_batch, unread_fault, with_tokens_first
from sclkern.step.config import StepConfig
from sclkern.step.dropout import batch_keys
from sclkern.step.encoding import Encodings, encode
from sclkern.step.fusion import fuse_views, image_token_positions, text_token_positions
from sclkern.step.masks import StepMasks, draw_prepared, draw_text, needed_masks
from sclkern.step.plan import Plan, make_plan


@dataclass
class SCLLosses:
    """Losses of a step, 0-d float32 tensors with their graph.

    Each objective is an attribute too: ``losses.itm`` is ``losses.losses["itm"]``, or None where the recipe does not
    have it.

    Attributes:
        total: the weighted sum.
        losses: by objective of the recipe, each before its weight. ITC and the completion losses sum both directions,
            MLTC both modalities.
        metrics: detached 0-d tensors by name, still on the device.
    """

    total: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)

    # Any, because only the recipe says which are None.
    def __getattr__(self, name: str) -> Any:
        # Reached only for what is no field; while a copy is made, before the fields exist.
        losses = self.__dict__.get("losses", {})
        if name in losses:
            return losses[name]
        if name in OBJECTIVES:
            return None
        raise AttributeError(f"SCLLosses has no attribute {name!r}; objectives: {', '.join(OBJECTIVES)}")

    def named(self) -> dict[str, Tensor]:
        """The losses by name, ``total`` first."""
        return {"total": self.total, **self.losses}


class Contrast(NamedTuple):
    """The losses of an accumulated batch over all ranks, for one of its micro-batches.

    Attributes:
        outputs: by objective, the loss and metrics of the whole batch, detached.
        gradients: by objective and name of its features: those of this micro-batch, scaled so that the mean over
            micro-batches and ranks is the gradient of the loss. Features without gradient are left out.
    """

    outputs: Mapping[str, LossOutput]
    gradients: Mapping[str, Mapping[str, Tensor]]


def run_step(
    network: SCLNetwork,
    objectives: ObjectiveConfig,
    step: StepConfig,
    batch: Mapping[str, Any],
    masks: StepMasks,
    *,
    counts: Mapping[str, Tensor] | None = None,
) -> SCLLosses:
    """Compute the losses of one step from given masks.

    Nothing is read from a GPU: there, the losses are NaN where a caption has no token or ``text_tokens`` is too small.

    Args:
        network: encoders, fusion encoder and heads.
        objectives: the recipe and its options.
        step: how it is executed.
        batch: as ``SCLModel.forward`` takes it.
        masks: of ``draw_masks`` for the same recipe.
        counts: of ``target_counts``, where the batch is a part of a global batch; None divides by its own targets.

    Returns:
        The losses.

    Raises:
        UserError: the network lacks a head or a mask token that an objective needs.
        TypeError: see ``check_step``.
        ValueError: see ``check_step``; or the batch is on another device than the network.
    """
    check_objectives(network.config, objectives)
    return _run(network, objectives, step, _prepared(network, objectives, batch), masks, counts, None)


def take_step(
    network: SCLNetwork,
    objectives: ObjectiveConfig,
    step: StepConfig,
    batch: Mapping[str, Any],
    seed: int | Tensor,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contrast: Contrast | None = None,
) -> SCLLosses:
    """Draw the masks of one step, and compute its losses.

    Args:
        network: encoders, fusion encoder and heads.
        objectives: the recipe and its options.
        step: how it is executed.
        batch: as ``SCLModel.forward`` takes it.
        seed: int or int64 tensor, the key of every mask.
        counts: as in ``run_step``.
        contrast: of ``contrast_batch``: the losses that see the whole accumulated batch, and their gradients.

    Returns:
        The losses.

    Raises:
        UserError: as ``run_step``.
        TypeError: as ``run_step``.
        ValueError: as ``run_step``.
    """
    check_objectives(network.config, objectives)
    batch = _prepared(network, objectives, batch)
    with phase("draw masks"):
        masks = draw_prepared(network.config, objectives, batch, seed)
    return _run(network, objectives, step, batch, masks, counts, contrast)


def _prepared(network: SCLNetwork, objectives: ObjectiveConfig, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    batch = prepare_batch(network.config, objectives, batch)
    device = network.modality.weight.device
    if batch["text_ids"].device != device:
        raise ValueError(f"batch: got device {batch['text_ids'].device}, expected that of the model, {device}")
    return batch


def take_features(
    network: SCLNetwork, objectives: ObjectiveConfig, step: StepConfig, batch: Mapping[str, Any], seed: int | Tensor,
    names: tuple[str, ...],
) -> dict[str, Mapping[str, Tensor]]:  # fmt: skip
    """Compute what some objectives contrast, and only what that needs: the first pass of a contrastive batch.

    Args:
        network: encoders, fusion encoder and heads.
        objectives: the recipe and its options.
        step: how it is executed.
        batch: as ``SCLModel.forward`` takes it, with ``place``.
        seed: as in ``take_step``.
        names: of the objectives, each with ``Objective.features``.

    Returns:
        Their features by objective, those that ``take_step`` has of the same batch and seed.

    Raises:
        UserError: as ``run_step``; or flash-attn draws the dropout masks.
        TypeError: as ``run_step``.
        ValueError: as ``run_step``; or the batch has no places.
    """
    check_objectives(network.config, objectives)
    if network.execution.backend == "flash" and network.training and network.config.dropout > 0:
        raise UserError(
            "backend: got 'flash' for a contrastive batch, whose two passes need the same dropout masks, and "
            "flash-attn draws its own; set run.backend=auto, or model.dropout=0"
        )
    if "place" not in batch:
        raise ValueError(
            f"batch: got keys {sorted(map(str, batch))}, expected 'place' too: a contrastive batch takes each row "
            "twice, with the masks of its place in the global batch"
        )
    batch = _prepared(network, objectives, batch)
    part = replace(objectives, recipe=names)
    with phase("draw masks"):
        masks = draw_prepared(network.config, part, batch, seed)
    plan = make_plan(part, step, whole=objectives)
    with one_seed_draw(), network.weights_cast():
        inputs, _ = _read(network, part, plan, batch, masks, None, early=False)
        found = {objective.name: objective.features for objective in part.selected}
        return {name: features(inputs) for name, features in found.items() if features is not None}


def target_counts(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    batches: Iterable[Mapping[str, Any]],
    seed: int | Tensor,
    *,
    group: Group = None,
) -> dict[str, Tensor]:
    """Count the tokens that MLM predicts and MLTC completes, as a mean over micro-batches and over all ranks.

    A sum over the targets of one micro-batch, divided by this, is a loss whose mean over micro-batches and ranks is the
    mean over all targets. Every rank must call it with the same number of micro-batches.

    Args:
        config: of the network.
        objectives: the recipe.
        batches: the micro-batches that are averaged over: all of the step with a contrastive batch, otherwise one.
        seed: of the step, as in ``take_step``.
        group: process group; None is the default group.

    Returns:
        0-d float64 by kind of token, of those kinds that a loss of the recipe divides by: for ``take_step``.
    """
    names = {objective.name for objective in objectives.selected}
    kinds: list[Literal["mlm", "completion"]] = []
    if "mlm" in names:
        kinds.append("mlm")
    if "mltc" in names:
        kinds.append("completion")
    found: list[Tensor] = []
    for batch in batches:
        captions = with_tokens_first(batch, config)
        found.append(
            torch.stack([draw_text(kind, config, objectives, captions, seed).selected.sum() for kind in kinds])
            if kinds
            else torch.zeros(0, dtype=torch.int64)
        )
    if not kinds or not found:
        return {}
    means = total(torch.stack(found).sum(0), group).double() / (len(found) * world_size(group))
    return dict(zip(kinds, means.unbind(), strict=True))


def _run(
    network: SCLNetwork, objectives: ObjectiveConfig, step: StepConfig, batch: Mapping[str, Any], masks: StepMasks,
    counts: Mapping[str, Tensor] | None, contrast: Contrast | None,
) -> SCLLosses:  # fmt: skip
    with one_seed_draw(), network.weights_cast():
        plan = make_plan(objectives, step, false_images=brings_false_images(objectives, batch))
        inputs, outputs = _read(network, objectives, plan, batch, masks, counts, contrast)
        outputs |= {
            objective.name: _run_loss(objective, inputs, contrast)
            for objective in objectives.selected
            if objective.name not in outputs
        }
        return _weighted_sum(objectives, outputs, unread_fault(batch))


def _read(
    network: SCLNetwork, objectives: ObjectiveConfig, plan: Plan, batch: Mapping[str, Any], masks: StepMasks,
    counts: Mapping[str, Tensor] | None, contrast: Contrast | None = None, *, early: bool = True,
) -> tuple[LossInputs, dict[str, LossOutput]]:  # fmt: skip
    """What the losses read; and with ``early`` those of unimodal features, which do not wait for fusion."""
    keys = batch_keys(network, masks)
    encodings = encode(network, plan, batch, masks, keys)
    inputs = _loss_inputs(network, objectives, plan, encodings, batch, masks)
    inputs.counts = counts
    similarity = text_to_image_similarity(inputs) if objectives.hard_negatives else None
    outputs = {
        objective.name: _run_loss(objective, inputs, contrast)
        for objective in objectives.selected
        if early and not objective.outputs
    }
    if plan.views:
        with phase("fusion"):
            positions = inputs.text_positions
            fused = fuse_views(network, plan, encodings, batch, masks, positions, similarity, keys)
        inputs.text_tokens, inputs.image_tokens = fused.text, fused.image
    return inputs, outputs


def _loss_inputs(
    network: SCLNetwork,
    objectives: ObjectiveConfig,
    plan: Plan,
    encodings: Encodings,
    batch: Mapping[str, Any],
    masks: StepMasks,
) -> LossInputs:
    lengths = batch["text_mask"].sum(1)
    whole_image = encodings.num_frames * (1 + network.config.num_patches)
    return LossInputs(
        network=network,
        options=objectives,
        batch=batch,
        num_frames=encodings.num_frames,
        text_encodings={text.variant: encodings.texts[text.name] for text in plan.unimodal_texts},
        image_encodings={image.variant: encodings.images[image.name] for image in plan.unimodal_images},
        match_labels=masks.itm_labels,
        text_positions=text_token_positions(masks, lengths),
        image_positions=image_token_positions(
            masks, encodings.num_frames, whole_image, rows=len(lengths), device=lengths.device
        ),
    )


def _run_loss(objective: Objective, inputs: LossInputs, contrast: Contrast | None) -> LossOutput:
    with phase(f"loss {objective.name}"):
        if contrast is None or objective.name not in contrast.outputs or objective.features is None:
            return objective.loss(inputs)
        output, gradients = contrast.outputs[objective.name], contrast.gradients[objective.name]
        if not gradients:
            return output
        value, metrics = output
        product = inner_product(objective.features(inputs), gradients)
        # The value of the loss of all pairs, with the gradient of this part of them.
        return LossOutput(value + (product - product.detach()), metrics)


def inner_product(features: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """The sum of products of features and the gradients with respect to them, whose own gradient these are.

    Args:
        features: by name, with their graph.
        gradients: by name, of those that have one; at least one.

    Returns:
        0-d, float32 at least.
    """
    products = [
        (at_least_float32(features[name]) * at_least_float32(gradient)).sum() for name, gradient in gradients.items()
    ]
    return torch.stack(products).sum()


def _weighted_sum(objectives: ObjectiveConfig, outputs: Mapping[str, LossOutput], fault: Tensor | None) -> SCLLosses:
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    total: Tensor | None = None
    for objective in objectives.selected:
        loss, of_objective = outputs[objective.name]
        loss = loss if fault is None else loss + fault
        losses[objective.name] = loss
        metrics |= of_objective
        weight = objectives.weight_of(objective)
        term = loss if weight == 1 else weight * loss
        total = term if total is None else total + term
    assert total is not None  # a recipe has at least one objective
    return SCLLosses(total, losses, metrics)


def check_objectives(config: SCLConfig, objectives: ObjectiveConfig) -> None:
    """Raise a ``UserError`` that names what a network of this configuration lacks for a recipe.

    Args:
        config: of the network.
        objectives: the recipe.
    """
    needed = {head for objective in objectives.selected for head in objective.heads}
    if objectives.hard_negatives:
        # The contrast chooses them.
        needed.add("itc")
    if lacking := needed - set(config.heads):
        raise UserError(f"heads: got {list(config.heads)}, recipe {objectives.recipe!r} needs {sorted(lacking)} too")
    if "token_masked" in needed_masks(objectives) and not config.patch_mask_token:
        raise UserError(f"patch_mask_token: the model has none, recipe {objectives.recipe!r} needs it")


def check_step(config: SCLConfig, objectives: ObjectiveConfig, batch: Mapping[str, Any]) -> None:
    """Raise an error that names what a step lacks, before any work is done.

    Args:
        config: of the network.
        objectives: the recipe.
        batch: as ``SCLModel.forward`` takes it.

    Raises:
        UserError: see ``check_objectives``.
        TypeError: an entry is no tensor or of another dtype, or ``text_tokens`` is no int.
        ValueError: the batch lacks an input; its inputs differ in rows or device; images of another size or too many
            frames; captions longer than ``max_text_len``; too few rows for in-batch negatives. On a CPU, and under
            ``SCLKERN_DEBUG=1``, also: ids outside the vocabulary, a mask of other numbers than 1 and 0, a caption
            without a token, ``text_tokens`` that is too small.
    """
    check_objectives(config, objectives)
    prepare_batch(config, objectives, batch)
