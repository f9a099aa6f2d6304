"""Objectives from outside the package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sclkern import ObjectiveConfig, UserError
from sclkern.objectives import OBJECTIVES, LossOutput, Objective, View, ViewOutputs, register
from sclkern.step import StepConfig, make_plan
from sclkern.step.flops import describe_plan, format_plan
from sclkern.training.report import plot_losses

BOTH_MASKED = View("both_masked", image="dropped", text="completion")


def agreement(inputs):
    text, image = inputs.text(BOTH_MASKED)[:, 0], inputs.image(BOTH_MASKED).mean(1)
    cosine = F.cosine_similarity(text, image, dim=-1).mean()
    return LossOutput(1 - cosine, {"agreement": cosine.detach()})


def objective(**changes):
    values = {
        "name": "agreement",
        "title": "agreement of masked pairs",
        "loss": agreement,
        "outputs": (ViewOutputs(BOTH_MASKED, text=("cls",), image=("cls",)),),
        "weight": 0.1,
    }
    return Objective(**{**values, **changes})


def test_an_objective_from_outside_is_planned_computed_summed_and_reported(make_model, make_batch, tmp_path):
    register(objective())
    objectives = ObjectiveConfig(recipe=("agreement", "mlm"))
    assert [view.name for view in make_plan(objectives, StepConfig()).views] == ["both_masked", "mlm"]
    model, batch = make_model(objectives), make_batch()
    for model.step in (StepConfig(), StepConfig(pack=False), StepConfig.published()):
        losses = model(batch, seed=2)
        assert list(losses.named()) == ["total", "mlm", "agreement"]
        torch.testing.assert_close(losses.total, losses.mlm + 0.1 * losses.agreement)
        torch.testing.assert_close(losses.agreement, 1 - losses.metrics["agreement"])
        losses.total.backward()
    printed = format_plan(describe_plan(model.config, objectives, StepConfig()))
    assert "both_masked" in printed
    assert "itm" not in printed
    rows = [{"kind": "train", "step": 1, "total": 2.0, "agreement": 0.5}]
    plot_losses(rows, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_the_table_is_restored_after_each_test():
    assert list(OBJECTIVES)[:6] == ["itm", "mlm", "itc", "mvsc", "mlsc", "mltc"]
    assert "agreement" not in OBJECTIVES


def test_its_weight_may_be_an_option():
    register(objective(weight="mltc_weight"))
    config = ObjectiveConfig(recipe=("agreement",), mltc_weight=0.3)
    assert config.weight_of(OBJECTIVES["agreement"]) == 0.3


def test_a_recipe_that_names_an_unregistered_objective_says_so():
    with pytest.raises(UserError, match=r"recipe: got 'agreement', expected some of itm, .*register it first"):
        ObjectiveConfig(recipe=("agreement",))


def test_the_same_objective_may_be_registered_again_and_another_not():
    first = register(objective())
    assert register(first) is first
    with pytest.raises(ValueError, match="objective 'agreement' is registered already"):
        register(objective(weight=0.2))


def test_a_view_has_one_meaning():
    other = ViewOutputs(View("masked_image", image="complete", text="complete"), text=("cls",))
    with pytest.raises(ValueError, match=r"view 'masked_image' of objective 'agreement' is \(complete, complete\)"):
        register(objective(outputs=(other,)))


@pytest.mark.parametrize("name", ["", "two words", "_hidden", "total", "metrics", "losses", "named"])
def test_a_name_must_be_usable_as_an_attribute(name):
    with pytest.raises(ValueError, match=r"^name: got "):
        objective(name=name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objective(outputs=()), "reads nothing"),
        (lambda: objective(unimodal_images=("matching",)), "unimodal_images: got 'matching', expected one of complete"),
        (lambda: objective(unimodal_texts=("masked",)), "unimodal_texts: got 'masked', expected one of complete, mlm"),
        (lambda: View("x", image="cropped", text="complete"), "image: got 'cropped', expected one of complete"),
        (lambda: View("x", image="complete", text="all"), "text: got 'all', expected one of complete"),
        (lambda: ViewOutputs(BOTH_MASKED), "text, image: both are empty, expected tokens of view 'both_masked'"),
        (lambda: ViewOutputs(BOTH_MASKED, text=("all",)), "text: got 'all', expected one of cls, mlm, completion"),
        (lambda: ViewOutputs(BOTH_MASKED, image=("mlm",)), "image: got 'mlm', expected one of cls, replaced"),
    ],
)
def test_what_is_not_in_the_vocabulary_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tokens_that_an_objective_does_not_list_are_not_there(make_model, make_batch):
    register(objective(outputs=(ViewOutputs(BOTH_MASKED, text=("cls",)),)))
    model = make_model(ObjectiveConfig(recipe=("agreement",)))
    with pytest.raises(ValueError, match="'cls' of view 'both_masked' is not computed; list it in the objective's"):
        model(make_batch(), seed=0)
