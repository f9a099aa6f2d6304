from __future__ import annotations

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from sclkern import ObjectiveConfig, UserError

HAS_REFERENCE = [name for name, kind in get_type_hints(ObjectiveConfig).items() if "reference" in get_args(kind)]


@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_reference_sets_every_option_that_has_it(recipe):
    config = ObjectiveConfig.reference(recipe)
    assert config.recipe == recipe
    assert {name: getattr(config, name) for name in HAS_REFERENCE} == dict.fromkeys(HAS_REFERENCE, "reference")
    others = {field.name for field in dataclasses.fields(config)} - {*HAS_REFERENCE, "recipe"}
    default = ObjectiveConfig()
    assert all(getattr(config, name) == getattr(default, name) for name in others)


def test_the_options_that_differ_from_the_published_code_are_these():
    assert set(HAS_REFERENCE) == {
        "negatives", "gather", "directions", "text_mask", "mlm_mask", "itm_negatives", "frame_norm",
        "itc_temperature", "empty_selections",
    }  # fmt: skip


def test_only_glscl_completes_tokens():
    assert set(ObjectiveConfig(recipe="glscl").tasks) - set(ObjectiveConfig(recipe="scl").tasks) == {"mltc"}


@pytest.mark.parametrize("name", [*HAS_REFERENCE, "recipe"])
def test_an_unknown_choice_is_named_with_the_known_ones(name):
    with pytest.raises(UserError, match=f"^{name}: got 'bogus', expected one of ") as error:
        ObjectiveConfig(**{name: "bogus"})
    assert getattr(ObjectiveConfig(), name) in str(error.value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, math.nan])
@pytest.mark.parametrize("name", ["image_mask_ratio", "patch_token_ratio", "text_mask_ratio", "mlm_ratio"])
def test_a_ratio_is_at_least_zero_and_below_one(name, value):
    with pytest.raises(UserError, match=f"^{name}: got {value}"):
        ObjectiveConfig(**{name: value})


@pytest.mark.parametrize("value", [0, -0.03, math.nan])
def test_the_temperature_is_positive(value):
    with pytest.raises(UserError, match=f"^temperature: got {value}"):
        ObjectiveConfig(temperature=value)


@pytest.mark.parametrize("value", [(0.0, 0.5), (0.5, 0.1), (-1.0, 0.5)])
def test_the_temperature_range_is_positive_and_ascending(value):
    with pytest.raises(UserError, match=r"^itc_temperature_range: got"):
        ObjectiveConfig(itc_temperature_range=value)


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ObjectiveConfig().recipe = "glscl"
