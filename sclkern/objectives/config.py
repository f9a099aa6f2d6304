"""What is trained: the recipe, and every choice where the paper, the code and we differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from sclkern.errors import UserError

RECIPES = {
    "scl": ("itm", "mlm", "itc", "mvsc", "mlsc"),
    "glscl": ("itm", "mlm", "itc", "mvsc", "mlsc", "mltc"),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objectives and their options; the value ``"reference"`` of an option is what the published code computes.

    Attributes:
        recipe: "scl" = ITM + MLM + ITC + MVSC + MLSC; "glscl" adds MLTC.
        negatives: whose features MVSC, MLSC and MLTC contrast against. "all": every rank's, in both modalities;
            "reference": MLSC and MLTC's image part see this rank's alone.
        gather: gradient through the gathering: "exact" = one big batch's; "reference" = 1/world of it.
        directions: of the completion InfoNCE: "both" summed (also "reference"), or "recovered_to_complete".
        text_mask: completion mask: "distinct" positions, exactly k; "reference" draws with replacement.
        mlm_mask: "at_least_one" target in every caption; "reference" as the published collator does, perhaps none.
        itm_negatives: where a false image comes from: "in_batch"; "hard", in the batch by the contrast's similarity;
            "dataset" (also "reference"), decoded anew as ``batch["false_image"]``.
        frame_norm: MVSC of clips normalises over "features"; "reference" over frames (of images always over features).
        itc_temperature: "clamped" to ``itc_temperature_range``; "reference" is free to reach 0.
        empty_selections: loss where nothing was masked: "zero"; "reference" is NaN, which MLTC drops on the host.
        temperature: of the completion losses. Ratios: the share of patches dropped, of patches replaced by the mask
            token, of words masked for completion, and of words to predict.
        mltc_weight, itc_weight: factors in the total; all others are 1.
    """

    recipe: Literal["scl", "glscl"] = "scl"
    negatives: Literal["all", "reference"] = "all"
    gather: Literal["exact", "reference"] = "exact"
    directions: Literal["both", "recovered_to_complete", "reference"] = "both"
    text_mask: Literal["distinct", "reference"] = "distinct"
    mlm_mask: Literal["at_least_one", "reference"] = "at_least_one"
    itm_negatives: Literal["in_batch", "hard", "dataset", "reference"] = "in_batch"
    frame_norm: Literal["features", "reference"] = "features"
    itc_temperature: Literal["clamped", "reference"] = "clamped"
    empty_selections: Literal["zero", "reference"] = "zero"
    temperature: float = 0.03
    itc_temperature_range: tuple[float, float] = (0.01, 0.5)
    image_mask_ratio: float = 0.8
    patch_token_ratio: float = 0.3
    text_mask_ratio: float = 0.4
    mlm_ratio: float = 0.15
    itc_weight: float = 0.5
    mltc_weight: float = 0.2

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(get_args(kind))}")
        for name in ("image_mask_ratio", "patch_token_ratio", "text_mask_ratio", "mlm_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 <= ratio < 1")
        if not self.temperature > 0:
            raise UserError(f"temperature: got {self.temperature}, expected a positive number")
        low, high = self.itc_temperature_range
        if not 0 < low <= high:
            raise UserError(f"itc_temperature_range: got {self.itc_temperature_range}, expected 0 < low <= high")

    @classmethod
    def reference(cls, recipe: str = "scl") -> ObjectiveConfig:
        """Every option as the published code has it."""
        options = {name: "reference" for name, kind in get_type_hints(cls).items() if "reference" in get_args(kind)}
        return cls(recipe=recipe, **options)

    @property
    def dataset_negatives(self) -> bool:
        """Whether a step reads ``batch["false_image"]``."""
        return self.itm_negatives in ("dataset", "reference")

    @property
    def tasks(self) -> tuple[str, ...]:
        return RECIPES[self.recipe]
