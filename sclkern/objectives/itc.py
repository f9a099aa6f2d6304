"""ITC, image-text contrast: the unimodal features of a pair are nearer than those of other pairs."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from sclkern import ops
from sclkern.models.config import SCLConfig
from sclkern.objectives._common import Gather, same_images
from sclkern.objectives.config import ObjectiveConfig
from sclkern.objectives.inputs import LossInputs
from sclkern.objectives.objective import LossOutput, Objective


def image_text_contrast(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    *,
    same: Tensor | None = None,
    group: ProcessGroup | None = None,
    gather: Gather = "exact",
    backend: str = "auto",
) -> Tensor:
    """Compute the symmetric InfoNCE of projected unimodal CLS features, both directions summed.

    Published objectives.py, compute_con. The step weights it by 0.5, which gives the usual average of the directions.

    Args:
        image: (B, E).
        text: (B, E); row i belongs to row i of ``image``.
        temperature: 0-d, learnable.
        same: (B,) int64 ids of images; other pairs of one image are no negatives. None: they are.
        group: process group whose rows are negatives too.
        gather: gradient through the all-gather, see ``ops.completion_loss``.
        backend: of the op.

    Returns:
        0-d loss.
    """
    return ops.completion_loss(
        image, text, temperature=temperature, same=same, group=group, gather=gather, backend=backend
    )


def contrast_temperature(temperature: Tensor, options: ObjectiveConfig) -> Tensor:
    """Clamp the temperature of the contrast, unless the options say "published".

    Args:
        temperature: 0-d, the parameter.
        options: ``itc_temperature`` and ``itc_temperature_range``.

    Returns:
        0-d.
    """
    if options.itc_temperature == "published":
        return temperature
    low, high = options.itc_temperature_range
    # The clamped value in the forward pass, but the gradient of the free one: otherwise a temperature that once left
    # the range could never come back.
    return temperature + (temperature.clamp(low, high) - temperature).detach()


def text_to_image_similarity(inputs: LossInputs) -> Tensor:
    """Cosine over temperature of every caption and every image of the batch, which chooses ITM's hard negatives.

    Args:
        inputs: with the encodings of complete captions and images.

    Returns:
        (B, B) float32: row = caption, column = image.
    """
    image, text = inputs.projections[1], inputs.projections[0]
    text, image = (F.normalize(features.detach().float(), dim=-1) for features in (text, image))
    return text @ image.T / contrast_temperature(inputs.network.temperature, inputs.options)


def _features(inputs: LossInputs) -> dict[str, Tensor]:
    text, image = inputs.projections
    temperature = contrast_temperature(inputs.network.temperature, inputs.options)
    features = {"image": image, "text": text, "temperature": temperature}
    return features | same_images(inputs.batch, inputs.options)


def _contrast(features: Mapping[str, Tensor], options: ObjectiveConfig, backend: str) -> LossOutput:
    temperature = features["temperature"]
    loss = image_text_contrast(
        features["image"],
        features["text"],
        temperature,
        same=features.get("same"),
        gather=options.gather,
        backend=backend,
    )
    return LossOutput(loss, {"itc_temperature": temperature.detach()})


def _loss(inputs: LossInputs) -> LossOutput:
    return _contrast(_features(inputs), inputs.options, inputs.network.backend)


def _flops(config: SCLConfig, tokens: Mapping[str, int]) -> float:
    return 2 * 2 * config.width * (config.width + config.projection_dim)


ITC = Objective(
    name="itc",
    title="ITC, image-text contrast",
    loss=_loss,
    unimodal_images=("complete",),
    unimodal_texts=("complete",),
    weight="itc_weight",
    heads=("itc",),
    features=_features,
    contrast=_contrast,
    flops=_flops,
)
