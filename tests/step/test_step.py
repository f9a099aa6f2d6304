"""The losses and gradients of a step: what they are, and what they do not depend on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sclkern import ObjectiveConfig
from sclkern.reference import MaskedText
from sclkern.step import StepConfig
from step_testing import FRAMES, RECIPES, assert_same, build, losses_of, masks_of, run

# -- what the losses are -----------------------------------------------------------------------------------------------


def contrast(recovered, complete, temperature):
    similarity = F.normalize(recovered, dim=-1) @ F.normalize(complete, dim=-1).T / temperature
    own = torch.arange(len(similarity))
    return F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)


def restated(model, batch, masks):
    """The step by the method's definition: a pass for each view, loops and boolean selections."""
    options = model.objectives
    image, ids, mask = batch["image"], batch["text_ids"], batch["text_mask"].bool()
    rows = len(ids)

    def fused(text_ids=ids, pixels=image, **masking):
        return model.run_fusion(model.encode_text(text_ids, mask), mask, model.encode_image(pixels, **masking))

    text, image_features = model.project(model.encode_text(ids, mask)[:, 0], model.encode_image(image).cls)
    itc = contrast(image_features, text, model.temperature)

    pixels = image.clone()
    for i in range(rows):
        if not masks.itm_labels[i]:
            other = (i + 1 + (int(masks.itm_keys[i]) * (rows - 1) >> 32)) % rows
            pixels[i] = batch["false_image"][i] if options.dataset_negatives else image[other]
    itm = F.cross_entropy(model.itm_head(model.pool(*fused(pixels=pixels).cls)), masks.itm_labels)

    predicted = model.mlm_head(fused(masks.mlm.ids).text)
    mlm = F.cross_entropy(predicted[masks.mlm.selected], ids[masks.mlm.selected])

    masked_image, masked_text = fused(keep=masks.keep), fused(masks.completion.ids)
    frames = masked_text.image.num_frames
    mvsc = (
        sum(
            contrast(masked_image.image.cls[:, f], masked_text.image.cls[:, f].detach(), options.temperature)
            for f in range(frames)
        )
        / frames
    )
    mlsc = contrast(masked_text.text[:, 0], masked_image.text[:, 0].detach(), options.temperature)
    losses = {"itm": itm, "mlm": mlm, "itc": itc, "mvsc": mvsc, "mlsc": mlsc}
    total = itm + mlm + options.itc_weight * itc + mvsc + mlsc
    if options.recipe == "glscl":
        words = masks.completion.selected
        text_part = contrast(masked_text.text[words], masked_image.text[words].detach(), options.temperature)
        places = masks.replace[:, None].expand(-1, frames, -1).flatten(1)
        recovered = fused(replace=masks.replace).image.patches[places]
        image_part = contrast(recovered, masked_text.image.patches[places].detach(), options.temperature)
        losses["mltc"] = text_part + image_part
        total = total + options.mltc_weight * losses["mltc"]
    return {"total": total, **losses}


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("itm_negatives", ["in_batch", "dataset"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_and_gradients_equal_the_definition(make_model, make_batch, recipe, itm_negatives, frames):
    objectives = ObjectiveConfig(recipe=recipe, itm_negatives=itm_negatives)
    model, batch = build(make_model, make_batch, objectives, frames)
    masks = masks_of(model, batch, 5)
    ours = run(model, batch, masks)
    model.zero_grad()
    expected = restated(model, batch, masks)
    expected["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(ours, ({name: loss.detach() for name, loss in expected.items()}, gradients))


@pytest.mark.parametrize("pack", [False, True])
def test_shared_encodings_encode_each_variant_once(make_model, make_batch, pack):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl"))
    model.step = StepConfig(pack=pack, share_encodings="all")
    calls = {"text": 0, "vision": 0}
    for name in calls:
        getattr(model, name).blocks[0].register_forward_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    model(batch, seed=0)
    # Text: complete, mlm, completion. Image: complete, dropped, token-masked.
    assert calls == ({"text": 1, "vision": 1} if pack else {"text": 3, "vision": 3})


OPTIONS = [
    StepConfig(),
    StepConfig(share_encodings="none"),
    StepConfig(share_encodings="all"),
    StepConfig(pack=False),
    StepConfig(prune_last_layer=False),
    StepConfig(absorb="never"),
    StepConfig(pack=False, prune_last_layer=False),
    StepConfig(checkpoint_blocks=True),
]


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("itm_negatives", ["in_batch", "hard", "dataset"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_way_of_execution_gives_the_same_losses_and_gradients(
    make_model, make_batch, recipe, itm_negatives, frames
):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe=recipe, itm_negatives=itm_negatives), frames)
    masks = masks_of(model, batch, 6)
    model.step = StepConfig.published()
    separate = run(model, batch, masks)
    for model.step in OPTIONS:
        assert_same(run(model, batch, masks), separate)
    # Room for more tokens than there are.
    model.step, batch["text_tokens"] = StepConfig(), int(batch["text_mask"].sum()) + 3
    assert_same(run(model, batch, masks), separate)


def test_with_dropout_the_losses_have_the_same_expectation(make_model, make_batch):
    # No image layers, which have no dropout, and few others: many samples are needed.
    model = make_model(
        ObjectiveConfig(recipe="glscl"), dropout=0.3, vision_layers=0, text_layers=1, dtype=torch.float32
    )
    batch = make_batch(dtype=torch.float32)
    masks = masks_of(model, batch, 3)
    samples = {}
    with torch.no_grad():
        for name, model.step in (("planned", StepConfig()), ("separate", StepConfig.published())):
            model.train()
            runs = []
            for seed in range(120):
                torch.manual_seed(seed)
                runs.append(torch.stack(list(losses_of(model, batch, masks).named().values())))
            samples[name] = torch.stack(runs)
    planned, separate = samples.values()
    error = (planned.var(0) / len(planned) + separate.var(0) / len(separate)).sqrt()
    assert ((planned.mean(0) - separate.mean(0)).abs() < 4 * error).all()
    # Dropout does something: without it all runs were one.
    assert (planned.std(0) > 1e-3).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_totals_gradient_is_the_weighted_sum_of_the_losses_gradients(make_model, make_batch, recipe):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe=recipe, itc_weight=0.7, mltc_weight=0.3))
    losses = losses_of(model, batch, masks_of(model, batch, 7)).named()
    parameters = list(model.parameters())
    gradients = {
        name: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, loss in losses.items()
    }
    weights = {"itm": 1, "mlm": 1, "itc": 0.7, "mvsc": 1, "mlsc": 1, "mltc": 0.3}
    for i, total in enumerate(gradients["total"]):
        expected = sum(weights[name] * gradients[name][i] for name in losses if name != "total")
        torch.testing.assert_close(total, expected)


def test_recipe_scl_has_no_token_completion(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="scl"))
    masks = masks_of(model, batch, 0)
    losses, gradients = run(model, batch, masks)
    assert masks.replace is None
    assert "mltc" not in losses
    assert "vision.mask_token" not in gradients
    torch.testing.assert_close(
        losses["total"], losses["itm"] + losses["mlm"] + 0.5 * losses["itc"] + losses["mvsc"] + losses["mlsc"]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_that_a_loss_can_reach_learns(make_model, make_batch, recipe):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe=recipe), frames=2)
    _, gradients = run(model, batch, masks_of(model, batch, 1))
    missing = {name for name, _ in model.named_parameters()} - gradients.keys()
    assert missing == ({"vision.mask_token"} if recipe == "scl" else set())


def test_losses_are_float32_scalars_of_a_float32_model(make_model, make_batch):
    model = make_model(ObjectiveConfig(recipe="glscl"), dtype=torch.float32)
    losses = model(make_batch(dtype=torch.float32), seed=0)
    assert {(loss.dtype, loss.shape) for loss in losses.named().values()} == {(torch.float32, torch.Size([]))}
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in losses.metrics.values())


def test_the_seed_alone_decides_a_step_in_eval_mode(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig())
    one, again, other = (model(batch, seed=seed).total for seed in (11, torch.tensor(11), 12))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_without_a_seed_torchs_generator_decides(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig())
    totals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        totals.append(model(batch).total.item())
    assert totals[0] == totals[1] != totals[2]


# -- what the losses do not depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_the_batch_wider_changes_nothing(make_model, make_batch, recipe):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe=recipe))
    wide = {
        **batch,
        "text_ids": F.pad(batch["text_ids"], (0, 4), value=1),
        "text_mask": F.pad(batch["text_mask"], (0, 4)),
    }
    narrow_run = run(model, batch, masks_of(model, batch, 8))
    assert_same(narrow_run, run(model, wide, masks_of(model, wide, 8)))


def test_what_the_encoder_leaves_at_padding_is_never_read(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl"))
    masks = masks_of(model, batch, 8)
    clean = run(model, batch, masks)[0]
    encode = model.encode_text

    def garbled(ids, mask, **options):
        return encode(ids, mask, **options).masked_fill(~mask[..., None], 1e3)

    model.encode_text = garbled
    for name, loss in run(model, batch, masks)[0].items():
        torch.testing.assert_close(loss, clean[name], rtol=1e-10, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_mask_of_zeros_and_ones_is_as_good_as_a_bool(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig())
    numbers = {**batch, "text_mask": batch["text_mask"].long()}
    assert torch.equal(model(batch, seed=1).total, model(numbers, seed=1).total)


@pytest.mark.parametrize("frames", FRAMES)
def test_the_order_of_the_batch_does_not_matter(make_model, make_batch, frames):
    # False images come with the batch here: one chosen in the batch would follow the row, not the sample.
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl", itm_negatives="dataset"), frames)
    masks = masks_of(model, batch, 9)
    order = torch.tensor([2, 0, 3, 1])
    permuted = dataclasses.replace(
        masks,
        keep=masks.keep[order],
        replace=masks.replace[order],
        mlm=MaskedText(*(x[order] for x in masks.mlm)),
        completion=MaskedText(*(x[order] for x in masks.completion)),
        itm_labels=masks.itm_labels[order],
    )
    shuffled = {name: value[order] for name, value in batch.items()}
    assert_same(run(model, batch, masks), run(model, shuffled, permuted))


def test_the_inputs_stay_as_they_are_and_the_graph_can_be_used_twice(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl"))
    before = {name: value.clone() for name, value in batch.items()}
    losses = model(batch, seed=0)
    losses.total.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses.total.backward()
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert all(torch.equal(p.grad, first[name]) for name, p in model.named_parameters())
