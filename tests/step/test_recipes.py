"""A recipe computes what its objectives read, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sclkern import ObjectiveConfig
from sclkern.objectives import OBJECTIVES
from sclkern.step import StepConfig, make_plan
from step_testing import losses_of, masks_of

ALONE = ["itm", "mlm", "itc", "mvsc", "mlsc", "mltc"]
# What each computes when it is alone: encodings of images, of texts, views, masks.
READS = {
    "itm": ({"complete"}, {"complete/itm"}, ["itm"], {"itm_labels", "itm_keys"}),
    "mlm": ({"complete"}, {"mlm/mlm"}, ["mlm"], {"mlm"}),
    "itc": ({"complete"}, {"complete/unimodal"}, [], set()),
    "mvsc": (
        {"dropped", "complete"},
        {"complete/masked_image", "completion/masked_text"},
        ["masked_image", "masked_text"],
        {"keep", "completion"},
    ),
    "mlsc": (
        {"dropped", "complete"},
        {"complete/masked_image", "completion/masked_text"},
        ["masked_image", "masked_text"],
        {"keep", "completion"},
    ),
    "mltc": (
        {"token_masked", "dropped", "complete"},
        {"complete/token_masked", "complete/masked_image", "completion/masked_text"},
        ["token_masked", "masked_text", "masked_image"],
        {"replace", "keep", "completion"},
    ),
}
HEADS = {
    "itm": {"itm_head", "text_pooler", "image_pooler"},
    "mlm": {"mlm_head"},
    "itc": {"text_projection", "image_projection", "temperature"},
}
STEPS = [
    StepConfig(),
    StepConfig.published(),
    StepConfig(share_encodings="none"),
    StepConfig(prune_last_layer=False),
    StepConfig(pack=False),
]


@pytest.mark.parametrize("name", ALONE)
def test_the_plan_is_what_the_objective_reads(make_model, make_batch, name):
    objectives = ObjectiveConfig(recipe=(name,))
    images, texts, views, drawn = READS[name]
    plan = make_plan(objectives, StepConfig())
    assert {image.name for image in plan.images} == images
    assert {text.name for text in plan.texts} == texts
    assert [view.name for view in plan.views] == views
    masks = masks_of(make_model(objectives), make_batch(), 0)
    tensors = {"keep", "replace", "mlm", "completion", "itm_labels", "itm_keys"}
    assert {field for field in tensors if getattr(masks, field) is not None} == drawn


@pytest.mark.parametrize("frames", [None, 3], ids=["images", "clips"])
@pytest.mark.parametrize("name", ALONE)
def test_an_objective_alone_has_the_loss_of_the_whole_recipe_and_touches_no_other_head(
    make_model, make_batch, name, frames
):
    model, batch = make_model(ObjectiveConfig(recipe="glscl"), max_frames=frames or 0), make_batch(frames=frames)
    whole = model(batch, seed=3)
    model.objectives = ObjectiveConfig(recipe=(name,))
    for model.step in STEPS:
        model.zero_grad()
        losses = model(batch, seed=3)
        assert set(losses.losses) == {name}
        torch.testing.assert_close(losses.losses[name], whole.losses[name], rtol=1e-8, atol=1e-9)
        weight = model.objectives.weight_of(OBJECTIVES[name])
        assert torch.equal(losses.total, losses.losses[name] if weight == 1 else weight * losses.losses[name])
        losses.total.backward()
        parts = {key.partition(".")[0] for key, p in model.named_parameters() if p.grad is not None}
        assert parts & {part for heads in HEADS.values() for part in heads} == HEADS.get(name, set())


def test_only_what_a_loss_reads_is_called(make_model, make_batch):
    model = make_model(ObjectiveConfig(recipe=("itc",)))
    called = set()
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(make_batch(), seed=0)
    assert called.isdisjoint({"fusion", "itm_head", "mlm_head", "text_pooler", "image_pooler"})
    assert {"text_projection", "image_projection", "text_transform"} <= called


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_some_objectives_of_a_recipe_have_their_losses_of_the_whole(make_model, make_batch, step):
    model, batch = make_model(ObjectiveConfig(recipe="glscl")), make_batch()
    model.step = step
    whole = model(batch, seed=4)
    for recipe in (("itm", "mlm"), ("mvsc", "mlm"), ("itc", "mltc"), ("mlsc", "mvsc")):
        model.objectives = ObjectiveConfig(recipe=recipe)
        losses = model(batch, seed=4)
        for name in recipe:
            torch.testing.assert_close(losses.losses[name], whole.losses[name], rtol=1e-8, atol=1e-9)
        assert all(getattr(losses, name) is None for name in set(ALONE) - set(recipe))


def test_hard_negatives_need_the_contrast_and_train_nothing_by_it(make_model, make_batch):
    model = make_model(ObjectiveConfig(recipe=("itm",), itm_negatives="hard"))
    model(make_batch(), seed=0).total.backward()
    assert model.temperature.grad is None
    assert model.text_projection[0].weight.grad is None
    without = make_model(ObjectiveConfig(recipe=("itm",), itm_negatives="hard"), heads=("itm",))
    with pytest.raises(ValueError, match=r"heads: .*needs \['itc'\] too"):
        without(make_batch(), seed=0)


def test_heads_that_nothing_reads_are_not_required(make_model, make_batch):
    # No ITM: no negative image, one row is enough, and its head may be missing.
    model = make_model(ObjectiveConfig(recipe=("mlm", "itc"), itm_negatives="dataset"), heads=("mlm", "itc"))
    assert model(make_batch(1), seed=0).total.isfinite()
    model.objectives = ObjectiveConfig(recipe=("mvsc",))
    assert model(make_batch(1), seed=0).total.isfinite()


def test_masks_of_another_recipe_are_refused(make_model, make_batch):
    model, batch = make_model(ObjectiveConfig(recipe=("itm",))), make_batch()
    masks = masks_of(model, batch, 0)
    model.objectives = ObjectiveConfig(recipe="scl")
    with pytest.raises(ValueError, match=r"masks\.keep: got None, expected a mask; draw the masks for the recipe"):
        losses_of(model, batch, masks)


def test_losses_name_what_they_have(make_model, make_batch):
    losses = make_model(ObjectiveConfig(recipe=("itm", "itc")))(make_batch(), seed=0)
    assert list(losses.named()) == ["total", "itm", "itc"]
    assert losses.itm is losses.named()["itm"]
    assert losses.mlm is None
    assert set(losses.metrics) == {"itm_accuracy", "itc_temperature"}
    with pytest.raises(AttributeError, match="no attribute 'itn'; objectives: itm, mlm"):
        losses.itn  # noqa: B018
    assert dataclasses.replace(losses).itm is losses.itm
