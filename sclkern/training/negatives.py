"""How many negatives each loss of a run has."""

from __future__ import annotations

from collections.abc import Iterator

from sclkern.objectives import Objective
from sclkern.step.contrastive import contrasted_objectives
from sclkern.step.masks import token_capacity
from sclkern.training.config import PretrainConfig

# What leaves other pairs of the same image out of its negatives.
_BY_IMAGE = ("itc", "mvsc", "mlsc")
_TOKENS = {"replaced": "image tokens", "completion": "text tokens"}


def describe_negatives(config: PretrainConfig, world_size: int, num_images: int) -> str:
    """What each sample is contrasted with, loss by loss.

    Args:
        config: of the run.
        world_size: number of processes.
        num_images: images to train on.

    Returns:
        Such as "ITC 31, MVSC 31, MLSC 31, ITM one of the 63 other images of a step", and how pairs of the same picture
        count; empty for a recipe without negatives.
    """
    run, objectives = config.run, config.objectives
    at_once = run.batch_size * world_size
    parts = [
        f"{objective.name.upper()} {_contrasted(config, objective, rows, world_size)}"
        for objective, rows in _contrasts(config, world_size)
    ]
    if objectives.dataset_negatives:
        parts.append(f"ITM one of the {num_images - 1} other images of the data")
    elif objectives.hard_negatives:
        parts.append(f"ITM one of the {run.batch_size - 1} other images of a forward pass, the similar ones more often")
    elif objectives.in_batch_negatives:
        parts.append(f"ITM one of the {at_once * run.accumulation - 1} other images of a step")
    less = ["ITM"] if objectives.uses_negative_images else []
    if objectives.same_image == "ignore":
        less = [objective.name.upper() for objective in objectives.selected if objective.name in _BY_IMAGE] + less
    return ", ".join(parts) + (f"; less those of the same picture: {', '.join(less)}" if less else "")


def count_negatives(config: PretrainConfig, world_size: int) -> dict[str, int]:
    """The negatives of a pair in each contrast of whole pairs.

    Args:
        config: of the run.
        world_size: number of processes.

    Returns:
        By objective of the recipe. MLTC contrasts tokens, which are not as many in each pair.
    """
    return {
        objective.name: int(_contrasted(config, objective, rows, world_size))
        for objective, rows in _contrasts(config, world_size)
        if not objective.contrast_tokens
    }


def _contrasts(config: PretrainConfig, world_size: int) -> Iterator[tuple[Objective, int]]:
    """The contrasts of a recipe, each with the pairs of one over all processes."""
    run, objectives = config.run, config.objectives
    at_once = run.batch_size * world_size
    everywhere: tuple[str, ...] = ()
    if run.contrastive_batch:
        everywhere = contrasted_objectives(config.model, objectives, run.contrastive_batch)
    for objective in objectives.selected:
        if objective.contrast is not None:
            yield objective, at_once * run.accumulation if objective.name in everywhere else at_once


def _contrasted(config: PretrainConfig, objective: Objective, rows: int, world_size: int) -> str:
    """Number of negatives in a contrast of so many samples over all processes."""
    of_process = rows // world_size if config.objectives.negatives == "published" else rows
    if not objective.contrast_tokens:
        return str((of_process if objective.name == "mlsc" else rows) - 1)
    capacity = token_capacity(config.model, config.objectives, config.model.max_text_len)
    return " and ".join(
        f"{'up to ' if kind == 'completion' else ''}"
        f"{(of_process if kind == 'replaced' else rows) * capacity[kind] - 1} {_TOKENS[kind]}"
        for kind in objective.contrast_tokens
    )
