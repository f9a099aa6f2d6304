"""What is trained: the recipe, and every choice where the paper, the published code and this library differ."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sclkern.errors import UserError
from sclkern.objectives.objective import OBJECTIVES, Objective

# Named sets of objectives.
RECIPES: dict[str, tuple[str, ...]] = {
    "scl": ("itm", "mlm", "itc", "mvsc", "mlsc"),
    "glscl": ("itm", "mlm", "itc", "mvsc", "mlsc", "mltc"),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which objectives are trained, and their options.

    The value ``"published"`` of an option is what the published code computes.

    Attributes:
        recipe: "scl" = ITM + MLM + ITC + MVSC + MLSC; "glscl" adds MLTC; or a list of names of objectives, such as
            ["itm", "mlm"]. Nothing is computed that no objective of the recipe reads. The order of a list does not
            matter.
        negatives: which features MVSC, MLSC and MLTC contrast against. "all": those of every rank, in both modalities;
            "published": MLSC and the image part of MLTC use those of their own rank only.
        gather: gradient through the all-gather: "exact" = that of one big batch; "published" = 1/world of it. None
            gathers nothing: losses are those of the process, as validation has them.
        directions: of the completion InfoNCE: "both" summed (also "published"), or "recovered_to_complete".
        text_mask: completion mask: exactly k "distinct" positions; "published" draws them with replacement.
        mlm_mask: "at_least_one" target in every caption; "published" as the published collator does, perhaps none.
        itm_negatives: source of ITM's negative images: "in_batch", another row's; "hard", another row's, drawn by the
            similarity of ITC; "dataset" (also "published"), ``batch["false_image"]``.
        same_image: what ITC, MVSC and MLSC do with other pairs of one image, by ``batch["image_id"]``: "ignore" leaves
            them out of the negatives, "negative" (also "published") does not. ITM never has the same picture as a false
            one.
        frame_norm: MVSC of clips normalises over "features"; "published" over frames (images always over features).
        itc_temperature: "clamped" to ``itc_temperature_range``; "published" may reach 0.
        empty_selections: loss where nothing is masked: "zero"; "published" is NaN, which MLTC replaces by 0.
        temperature: of the completion losses.
        itc_temperature_range: smallest and largest temperature of ITC.
        image_mask_ratio: share of the patches that a dropped image lacks.
        patch_token_ratio: share of the patches that a token-masked image replaces by the mask token.
        text_mask_ratio: share of a caption's tokens that are masked for completion.
        mlm_ratio: share of a caption's tokens that MLM predicts.
        itc_weight: factor of ITC in the total.
        mltc_weight: factor of MLTC in the total.
    """

    recipe: str | tuple[str, ...] = "scl"
    negatives: Literal["all", "published"] = "all"
    gather: Literal["exact", "published", None] = "exact"
    directions: Literal["both", "recovered_to_complete", "published"] = "both"
    text_mask: Literal["distinct", "published"] = "distinct"
    mlm_mask: Literal["at_least_one", "published"] = "at_least_one"
    itm_negatives: Literal["in_batch", "hard", "dataset", "published"] = "in_batch"
    same_image: Literal["ignore", "negative", "published"] = "ignore"
    frame_norm: Literal["features", "published"] = "features"
    itc_temperature: Literal["clamped", "published"] = "clamped"
    empty_selections: Literal["zero", "published"] = "zero"
    temperature: float = 0.03
    itc_temperature_range: tuple[float, float] = (0.01, 0.5)
    image_mask_ratio: float = 0.8
    patch_token_ratio: float = 0.3
    text_mask_ratio: float = 0.4
    mlm_ratio: float = 0.15
    itc_weight: float = 0.5
    mltc_weight: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", _checked_recipe(self.recipe))
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UserError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(str, get_args(kind)))}"
                )
        for name in ("image_mask_ratio", "patch_token_ratio", "text_mask_ratio", "mlm_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 <= ratio < 1")
        if not self.temperature > 0:
            raise UserError(f"temperature: got {self.temperature}, expected a positive number")
        low, high = self.itc_temperature_range
        if not 0 < low <= high:
            raise UserError(f"itc_temperature_range: got {self.itc_temperature_range}, expected 0 < low <= high")

    @classmethod
    def published(cls, recipe: str | tuple[str, ...] = "scl") -> ObjectiveConfig:
        """Take every option as the published code has it.

        Args:
            recipe: as in the class.

        Returns:
            The options.
        """
        hints = get_type_hints(cls).items()
        options: dict[str, Any] = {name: "published" for name, kind in hints if "published" in get_args(kind)}
        return cls(recipe=recipe, **options)

    @property
    def recipe_name(self) -> str:
        """The recipe for people: "scl", "itm + mlm"."""
        return self.recipe if isinstance(self.recipe, str) else " + ".join(self.recipe)

    @property
    def selected(self) -> tuple[Objective, ...]:
        """The objectives of the recipe, in the order of the table."""
        names = RECIPES[self.recipe] if isinstance(self.recipe, str) else self.recipe
        return tuple(objective for name, objective in OBJECTIVES.items() if name in names)

    def weight_of(self, objective: Objective) -> float:
        """The factor of an objective in the total.

        Args:
            objective: any of the table.

        Returns:
            Its weight, read from the option that holds it where it is an option.
        """
        return float(getattr(self, objective.weight) if isinstance(objective.weight, str) else objective.weight)

    @property
    def uses_negative_images(self) -> bool:
        """Whether an objective reads negative images: the view of ITM, or another with image variant "matching"."""
        views = [outputs.view for objective in self.selected for outputs in objective.outputs]
        return any(view.image == "matching" for view in views)

    @property
    def dataset_negatives(self) -> bool:
        """Whether a step reads ``batch["false_image"]``."""
        return self.uses_negative_images and self.itm_negatives in ("dataset", "published")

    @property
    def in_batch_negatives(self) -> bool:
        """Whether negative images are those of other rows, so that a batch needs at least two."""
        return self.uses_negative_images and not self.dataset_negatives

    @property
    def hard_negatives(self) -> bool:
        """Whether negative images are drawn by the similarity of the image-text contrast, which needs its head."""
        return self.uses_negative_images and self.itm_negatives == "hard"


def _checked_recipe(recipe: object) -> str | tuple[str, ...]:
    """The recipe, a list as a tuple; ``UserError`` where it is unknown, empty or names an objective twice."""
    expected = f"expected one of {', '.join(RECIPES)}, or a list of objectives ({', '.join(OBJECTIVES)})"
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UserError(f"recipe: got {recipe!r}, {expected}")
        return recipe
    names = tuple(recipe) if isinstance(recipe, Iterable) else ()
    if not names or len(set(names)) < len(names):
        raise UserError(f"recipe: got {recipe!r}, {expected}, each once")
    for name in names:
        if name not in OBJECTIVES:
            near = difflib.get_close_matches(str(name), OBJECTIVES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; register it first"
            raise UserError(f"recipe: got {name!r}, expected some of {', '.join(OBJECTIVES)}{hint}")
    return names
