"""The losses of a step: encode, fuse, and run every objective of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sclkern.errors import UserError
from sclkern.models.config import SCLConfig
from sclkern.models.network import SCLNetwork
from sclkern.objectives import OBJECTIVES, LossInputs, LossOutput, Objective, ObjectiveConfig
from sclkern.objectives.itc import text_to_image_similarity
from sclkern.profiling import phase
from sclkern.random import one_seed_draw
from sclkern.step.batch import prepare_batch, unread_fault
from sclkern.step.config import StepConfig
from sclkern.step.encoding import Encodings, encode
from sclkern.step.fusion import fuse_views, image_token_positions, text_token_positions
from sclkern.step.masks import StepMasks, draw_prepared, needed_masks
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


def run_step(
    network: SCLNetwork,
    objectives: ObjectiveConfig,
    step: StepConfig,
    batch: Mapping[str, Any],
    masks: StepMasks,
) -> SCLLosses:
    """Compute the losses of one step from given masks.

    Nothing is read from a GPU: there, the losses are NaN where a caption has no token or ``text_tokens`` is too small.

    Args:
        network: encoders, fusion encoder and heads.
        objectives: the recipe and its options.
        step: how it is executed.
        batch: as ``SCLModel.forward`` takes it.
        masks: of ``draw_masks`` for the same recipe.

    Returns:
        The losses.

    Raises:
        UserError: the network lacks a head or a mask token that an objective needs.
        TypeError: see ``check_step``.
        ValueError: see ``check_step``; or the batch is on another device than the network.
    """
    check_objectives(network.config, objectives)
    return _run(network, objectives, step, _prepared(network, objectives, batch), masks)


def take_step(
    network: SCLNetwork, objectives: ObjectiveConfig, step: StepConfig, batch: Mapping[str, Any], seed: int | Tensor
) -> SCLLosses:
    """Draw the masks of one step, and compute its losses.

    Args:
        network: encoders, fusion encoder and heads.
        objectives: the recipe and its options.
        step: how it is executed.
        batch: as ``SCLModel.forward`` takes it.
        seed: int or int64 tensor, the key of every mask.

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
    return _run(network, objectives, step, batch, masks)


def _prepared(network: SCLNetwork, objectives: ObjectiveConfig, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    batch = prepare_batch(network.config, objectives, batch)
    device = network.modality.weight.device
    if batch["text_ids"].device != device:
        raise ValueError(f"batch: got device {batch['text_ids'].device}, expected that of the model, {device}")
    return batch


def _run(
    network: SCLNetwork, objectives: ObjectiveConfig, step: StepConfig, batch: Mapping[str, Any], masks: StepMasks
) -> SCLLosses:
    with one_seed_draw(), network.weights_cast():
        return _compute(network, objectives, step, batch, masks)


def _compute(
    network: SCLNetwork, objectives: ObjectiveConfig, step: StepConfig, batch: Mapping[str, Any], masks: StepMasks
) -> SCLLosses:
    plan = make_plan(objectives, step)
    encodings = encode(network, plan, batch, masks)
    inputs = _loss_inputs(network, objectives, plan, encodings, batch, masks)
    similarity = text_to_image_similarity(inputs) if objectives.hard_negatives else None
    # Losses of unimodal features do not wait for fusion.
    outputs = {
        objective.name: _run_loss(objective, inputs) for objective in objectives.selected if not objective.outputs
    }
    if plan.views:
        with phase("fusion"):
            fused = fuse_views(network, plan, encodings, batch, masks, inputs.text_positions, similarity)
        inputs.text_tokens, inputs.image_tokens = fused.text, fused.image
    outputs |= {objective.name: _run_loss(objective, inputs) for objective in objectives.selected if objective.outputs}
    return _weighted_sum(objectives, outputs, unread_fault(batch))


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


def _run_loss(objective: Objective, inputs: LossInputs) -> LossOutput:
    with phase(f"loss {objective.name}"):
        return objective.loss(inputs)


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
