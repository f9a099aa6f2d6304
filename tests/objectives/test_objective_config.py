from __future__ import annotations

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from sclkern import ObjectiveConfig, UserError

HAS_PUBLISHED = [name for name, kind in get_type_hints(ObjectiveConfig).items() if "published" in get_args(kind)]


@pytest.mark.parametrize("recipe", ["scl", "glscl"])
def test_published_sets_every_option_that_has_it(recipe):
    config = ObjectiveConfig.published(recipe)
    assert config.recipe == recipe
    assert {name: getattr(config, name) for name in HAS_PUBLISHED} == dict.fromkeys(HAS_PUBLISHED, "published")
    others = {field.name for field in dataclasses.fields(config)} - {*HAS_PUBLISHED, "recipe"}
    default = ObjectiveConfig()
    assert all(getattr(config, name) == getattr(default, name) for name in others)


def test_the_options_that_differ_from_the_published_code_are_these():
    assert set(HAS_PUBLISHED) == {
        "negatives", "gather", "directions", "text_mask", "mlm_mask", "itm_negatives", "same_image",
            "frame_norm",
        "itc_temperature", "empty_selections",
    }  # fmt: skip


def names(recipe):
    return [objective.name for objective in ObjectiveConfig(recipe=recipe).selected]


def test_only_glscl_completes_tokens():
    assert names("scl") == ["itm", "mlm", "itc", "mvsc", "mlsc"]
    assert names("glscl") == [*names("scl"), "mltc"]


def test_a_recipe_may_be_a_list_whose_order_does_not_matter():
    assert names(["mlm", "itm"]) == names(("itm", "mlm")) == ["itm", "mlm"]
    assert ObjectiveConfig(recipe=["itm", "mlm"]).recipe == ("itm", "mlm")
    assert hash(ObjectiveConfig(recipe=["itm"])) == hash(ObjectiveConfig(recipe=("itm",)))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], r"recipe: got \[\], expected one of scl, glscl, or a list of objectives \(itm, mlm,"),
        (["itm", "itm"], r"recipe: got \['itm', 'itm'\], .*each once"),
        (["itm", "mvcs"], "recipe: got 'mvcs', expected some of itm, mlm, .*did you mean 'mvsc'"),
        (["itm", 3], "recipe: got 3, expected some of"),
        (5, "recipe: got 5, expected one of scl, glscl"),
        ("itm", "recipe: got 'itm', expected one of scl, glscl"),
    ],
)
def test_an_unusable_recipe_is_named(recipe, message):
    with pytest.raises(UserError, match=f"^{message}"):
        ObjectiveConfig(recipe=recipe)


def test_negative_images_are_needed_by_what_reads_them():
    for negatives, dataset, in_batch in (("in_batch", 0, 1), ("hard", 0, 1), ("dataset", 1, 0), ("published", 1, 0)):
        config = ObjectiveConfig(recipe=("itm",), itm_negatives=negatives)
        assert (config.dataset_negatives, config.in_batch_negatives) == (dataset, in_batch)
        without = ObjectiveConfig(recipe=("mlm",), itm_negatives=negatives)
        assert not without.dataset_negatives
        assert not without.in_batch_negatives
        assert not without.hard_negatives


@pytest.mark.parametrize("name", [*HAS_PUBLISHED, "recipe"])
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
