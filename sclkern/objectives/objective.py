"""An objective as data, and the table of all objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sclkern.models.config import SCLConfig
from sclkern.objectives.views import (
    IMAGE_VARIANTS,
    TEXT_VARIANTS,
    ImageTokens,
    ImageVariant,
    TextTokens,
    TextVariant,
    ViewOutputs,
    check_known,
)

# Attributes of ``SCLLosses`` that are no objectives.
_RESERVED = ("total", "losses", "metrics", "named")


class LossOutput(NamedTuple):
    """What an objective computes.

    Attributes:
        loss: 0-d float32, with its graph, before the objective's weight.
        metrics: 0-d tensors by name, detached and still on the device.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs. The plan of a step, its losses, the phases of a profile and reports follow from it.

    Attributes:
        name: a Python identifier: of the loss in ``SCLLosses``, in a recipe and in metrics.
        title: what reports call it.
        loss: computes the loss from a ``sclkern.objectives.inputs.LossInputs``.
        outputs: the fused tokens it reads, by view.
        unimodal_images: variants whose encoding before fusion it reads.
        unimodal_texts: variants whose encoding before fusion it reads.
        weight: factor in the total: a number, or the field of ``ObjectiveConfig`` that holds it.
        heads: the heads of ``SCLConfig`` that it uses.
        features: what the loss contrasts, from a ``LossInputs``: by name, floating tensors, masks and ids with a row
            for each sample, and 0-d parameters such as a temperature. With ``contrast`` it lets the loss see every pair
            of an accumulated batch over all ranks (``sclkern.step.contrastive``); an objective without sees those of
            its micro-batch over all ranks.
        contrast: computes the loss from such features of any number of samples, an ``ObjectiveConfig`` and the backend
            of ops; across ranks it gathers them.
        contrast_tokens: the kinds of tokens of which each is compared with each; () is one row a sample. It bounds how
            many rows ``contrast`` gets.
        flops: FLOPs of its heads for one sample, forward, from the sizes of the model and the number of tokens of each
            kind ("cls", "mlm", "completion", "replaced") that a sample has room for; None counts nothing.
    """

    name: str
    title: str
    loss: Callable[[Any], LossOutput]
    outputs: tuple[ViewOutputs, ...] = ()
    unimodal_images: tuple[ImageVariant, ...] = ()
    unimodal_texts: tuple[TextVariant, ...] = ()
    weight: float | str = 1.0
    heads: tuple[str, ...] = ()
    features: Callable[[Any], Mapping[str, Tensor]] | None = None
    contrast: Callable[[Mapping[str, Tensor], Any, str], LossOutput] | None = None
    contrast_tokens: tuple[TextTokens | ImageTokens, ...] = ()
    flops: Callable[[SCLConfig, Mapping[str, int]], float] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name.startswith("_") or self.name in _RESERVED:
            raise ValueError(f"name: got {self.name!r}, expected an identifier other than {', '.join(_RESERVED)}")
        if not (self.outputs or self.unimodal_images or self.unimodal_texts):
            raise ValueError(f"outputs: objective {self.name!r} reads nothing; give outputs or unimodal variants")
        if (self.features is None) != (self.contrast is None):
            raise ValueError(f"features, contrast: objective {self.name!r} has one of them, expected both or neither")
        for image in self.unimodal_images:
            check_known("unimodal_images", image, tuple(name for name in IMAGE_VARIANTS if name != "matching"))
        for text in self.unimodal_texts:
            check_known("unimodal_texts", text, TEXT_VARIANTS)


# Every objective by name, in the order in which losses are summed and reported. ``register`` fills it.
OBJECTIVES: dict[str, Objective] = {}


def register(objective: Objective) -> Objective:
    """Add an objective to the table, after which recipes may name it.

    Args:
        objective: the objective; it comes last in sums and reports.

    Returns:
        The objective.

    Raises:
        ValueError: the table has another objective of this name, or a view of the same name with other variants.
    """
    if OBJECTIVES.get(objective.name, objective) != objective:
        raise ValueError(f"objective {objective.name!r} is registered already; choose another name")
    known = {outputs.view.name: outputs.view for other in OBJECTIVES.values() for outputs in other.outputs}
    for outputs in objective.outputs:
        if known.get(outputs.view.name, outputs.view) != outputs.view:
            raise ValueError(
                f"view {outputs.view.name!r} of objective {objective.name!r} is "
                f"({outputs.view.image}, {outputs.view.text}), another objective has it with other variants; "
                "choose another name"
            )
    OBJECTIVES[objective.name] = objective
    return objective
