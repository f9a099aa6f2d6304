"""Batches that say their places: however a global batch is cut, packed or ordered, each row gets the same numbers."""

from __future__ import annotations

import pytest
import torch
from global_batch import ROWS, SEED, assert_close, global_batch, gradients_of, one_batch, part_of, train

from sclkern import ObjectiveConfig
from sclkern.errors import UserError
from sclkern.objectives import LossOutput, Objective, View, ViewOutputs, register
from sclkern.step import StepConfig, contrast_batch, contrasted_objectives, make_plan, target_counts
from sclkern.step import losses as module
from sclkern.step.dropout import SEQUENCES, text_number, view_number
from sclkern.step.masks import draw_prepared
from step_testing import FRAMES

NEGATIVES = ["dataset", "in_batch"]


def values_of(model, batch):
    """What the losses read of each row, by its place, with the gradients of a sum over rows."""
    found, network, objectives = {}, model, model.objectives
    batch = module._prepared(network, objectives, batch)
    masks = draw_prepared(network.config, objectives, batch, SEED)
    plan = make_plan(objectives, model.step, false_images=module.brings_false_images(objectives, batch))
    inputs, _ = module._read(network, objectives, plan, batch, masks, None, early=False)
    for kind, tokens, positions in (
        ("text", inputs.text_tokens, inputs.text_positions),
        ("image", inputs.image_tokens, inputs.image_positions),
    ):
        for view, kinds in tokens.items():
            for name, values in kinds.items():
                valid = positions.valid.get(name)
                for row, place in enumerate(batch["place"].tolist()):
                    of_row = values[row] if valid is None else values[row][valid[row]]
                    found[kind, view, name, place] = of_row
    for row, place in enumerate(batch["place"].tolist()):
        length = int(batch["text_mask"][row].sum())
        for name, encoding in inputs.text_encodings.items():
            found["encoded text", name, place] = encoding[row, :length]
        for name, encoding in inputs.image_encodings.items():
            found["encoded image", name, place] = encoding[row]
    model.zero_grad()
    sum((value**2).sum() for value in found.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}, gradients


CUTS = {
    "halves": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "permuted": [[5, 2, 7, 0, 6, 1, 4, 3]],
    "scattered": [[3, 0], [6, 1, 5], [7, 2, 4]],
}
EXECUTIONS = {
    "packed": StepConfig(),
    "padded": StepConfig(pack=False),
    "checkpointed": StepConfig(checkpoint_blocks=True),
    "unabsorbed": StepConfig(absorb="never"),
    "all shared": StepConfig(share_encodings="all"),
    "nothing shared": StepConfig(share_encodings="none"),
}


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize(
    ("recipe", "cut", "execution"),
    [
        ("glscl", "halves", "packed"),
        ("glscl", "scattered", "padded"),
        ("scl", "permuted", "checkpointed"),
        ("glscl", "scattered", "unabsorbed"),
        ("scl", "halves", "nothing shared"),
        ("scl", "permuted", "all shared"),
    ],
)
def test_each_row_has_the_same_numbers_in_every_cut(make_model, make_batch, recipe, frames, negatives, cut, execution):
    model = train(make_model, recipe, negatives, frames)
    whole = global_batch(make_batch, negatives, frames)
    step = EXECUTIONS[execution]
    # One execution cuts the batch, another has all of it; what is shared is the same in both.
    model.step = StepConfig(share_encodings=step.share_encodings)
    expected, gradients = values_of(model, whole)
    model.step = step
    found, total = {}, {}
    for rows in CUTS[cut]:
        values, part = values_of(model, part_of(whole, rows))
        found |= values
        total = {name: total.get(name, 0) + gradient for name, gradient in part.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(total[name] / scale, gradient / scale, rtol=1e-9, atol=1e-9)


def test_another_seed_or_place_draws_other_masks(make_model, make_batch):
    model = train(make_model, "scl", "in_batch")
    batch = global_batch(make_batch, "in_batch")
    first = model(batch, seed=SEED).total
    assert torch.equal(model(batch, seed=SEED).total, first)
    assert not torch.equal(model(batch, seed=SEED + 1).total, first)
    moved = batch | {"place": batch["place"] + 100, "false_place": batch["false_place"] + 100}
    assert not torch.equal(model(moved, seed=SEED).total, first)


def test_false_images_decoded_again_are_those_of_the_batch(make_model, make_batch):
    model = train(make_model, "scl", "in_batch")
    brought = global_batch(make_batch, "in_batch")
    taken = {name: value for name, value in brought.items() if name != "false_image"}
    torch.testing.assert_close(model(taken, seed=SEED).itm, model(brought, seed=SEED).itm, rtol=1e-12, atol=1e-12)


def test_a_view_draws_the_same_dropout_in_another_recipe(make_model, make_batch):
    batch = global_batch(make_batch, "in_batch")
    alone = train(make_model, ["mlm"], "in_batch")(batch, seed=SEED).mlm
    together = train(make_model, "glscl", "in_batch")(batch, seed=SEED).mlm
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_norm", ["sclkern", "torch"])
@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_every_backend_drops_the_same(make_model, make_batch, backend, layer_norm):
    model = train(make_model, "glscl", "in_batch")
    batch = global_batch(make_batch, "in_batch")
    expected = model(batch, seed=SEED).total
    model.set_backend(backend).set_layer_norm(layer_norm)
    for step in (StepConfig(), StepConfig(pack=False)):
        model.step = step
        torch.testing.assert_close(model(batch, seed=SEED).total, expected, rtol=1e-10, atol=1e-10)


def test_every_module_with_dropout_has_a_number_of_its_own(make_model):
    model = make_model(dropout=0.1)
    numbers = [
        module.dropout_number
        for encoder in (model.text, model.fusion)
        for module in encoder.modules()
        if hasattr(module, "dropout_number")
    ]
    assert sorted(numbers) == list(range(model.dropout_modules))
    config = model.config
    assert len(numbers) == 1 + 3 * config.text_layers + 2 * 5 * config.fusion_layers


def test_every_encoding_and_view_has_a_number_of_its_own():
    for share in ("images", "all", "none"):
        plans = [
            make_plan(ObjectiveConfig(recipe=recipe), StepConfig(share_encodings=share)) for recipe in ("scl", "glscl")
        ]
        texts = {text.name for plan in plans for text in plan.texts}
        views = {view.name for plan in plans for view in plan.views}
        for names, number in ((texts, text_number), (views, view_number)):
            assert len({number(name) for name in names}) == len(names)
            assert all(0 <= number(name) < SEQUENCES for name in names)


def test_more_views_than_there_are_numbers():
    for i in range(SEQUENCES):
        view = View(f"view_{i}", "complete", "complete")
        register(Objective(f"own_{i}", "own", loss=None, outputs=(ViewOutputs(view, text=("cls",)),)))
    with pytest.raises(ValueError, match="got view number 62 of all objectives, expected at most 61"):
        view_number("view_56")


# -- targets, and the contrastive batch --------------------------------------------------------------------------------


def accumulated(model, batches, contrastive):
    """Mean losses and gradients of micro-batches that divide by the targets of all."""
    model.zero_grad()
    counts = target_counts(model.config, model.objectives, batches, SEED)
    contrasts = contrast_batch(model, batches, SEED) if contrastive else [None] * len(batches)
    mean = {}
    for batch, contrast in zip(batches, contrasts, strict=True):
        losses = model(batch, seed=SEED, counts=counts, contrast=contrast)
        (losses.total / len(batches)).backward()
        for name, loss in losses.named().items():
            mean[name] = mean.get(name, 0) + loss.detach() / len(batches)
    return mean, gradients_of(model)


# Each value of each option with each of another, in fewer runs than all of them.
CONTRASTS = [
    ("scl", None, "in_batch", 1),
    ("glscl", 3, "in_batch", 2),
    ("glscl", None, "dataset", 4),
    ("scl", 3, "dataset", 2),
    ("glscl", 3, "dataset", 1),
    ("scl", 3, "in_batch", 4),
]


@pytest.mark.parametrize(("recipe", "frames", "negatives", "accumulation"), CONTRASTS)
def test_a_contrastive_batch_equals_one_big_batch(make_model, make_batch, recipe, frames, negatives, accumulation):
    model = train(make_model, recipe, negatives, frames)
    batch = global_batch(make_batch, negatives, frames)
    if accumulation == 2:
        model.step = StepConfig(checkpoint_blocks=True)
    ours = accumulated(model, micro_batches(batch, accumulation), contrastive=True)
    model.step = StepConfig()
    expected = one_batch(model, batch)
    assert "temperature" in expected[1]
    assert_close(ours, expected)


def test_other_pairs_of_the_same_image_are_no_negatives(make_model, make_batch):
    batch = global_batch(make_batch, "dataset")
    without = {name: value for name, value in batch.items() if name != "image_id"}
    losses = {}
    for same_image in ("ignore", "negative", "published"):
        model = train(make_model, "glscl", "dataset", same_image=same_image)
        losses[same_image], losses[same_image, "without"] = (one_batch(model, of)[0] for of in (batch, without))
    for name, loss in losses["ignore"].items():
        contrasts = name in ("itc", "mvsc", "mlsc", "total")
        assert (loss < losses["negative"][name]) if contrasts else torch.equal(loss, losses["negative"][name]), name
        for other in ("published", ("ignore", "without"), ("published", "without")):
            assert torch.equal(losses["negative"][name], losses[other][name]), (name, other)


def micro_batches(batch, accumulation):
    size = ROWS // accumulation
    return [part_of(batch, range(start, start + size)) for start in range(0, ROWS, size)]


@pytest.mark.parametrize("pack", [True, False])
def test_losses_without_contrast_divide_by_the_targets_of_all(make_model, make_batch, pack):
    model = train(make_model, ["itm", "mlm"], "in_batch")
    model.step = StepConfig(pack=pack)
    batch = global_batch(make_batch, "in_batch")
    ours = accumulated(model, micro_batches(batch, 4), contrastive=False)
    assert_close(ours, one_batch(model, batch))


def test_tokens_that_are_too_many_contrast_within_the_micro_batch(make_model, make_batch, monkeypatch):
    model = train(make_model, "glscl", "in_batch")
    batches = micro_batches(global_batch(make_batch, "in_batch"), 2)
    assert contrasted_objectives(model.config, model.objectives, ROWS) == ("itc", "mvsc", "mlsc", "mltc")
    monkeypatch.setattr("sclkern.step.contrastive.MAX_ROWS", ROWS)
    assert contrasted_objectives(model.config, model.objectives, ROWS) == ("itc", "mvsc", "mlsc")
    counts = target_counts(model.config, model.objectives, batches, SEED)
    contrasts = contrast_batch(model, batches, SEED)
    assert all("mltc" not in contrast.outputs for contrast in contrasts)
    # What it sums over captions is divided by the targets of all.
    own = [target_counts(model.config, model.objectives, [batch], SEED)["completion"] for batch in batches]
    alone = [model(batch, seed=SEED).metrics["mltc_text"] for batch in batches]
    text = [model(batch, seed=SEED, counts=counts).metrics["mltc_text"] for batch in batches]
    weighted = sum(loss * count for loss, count in zip(alone, own, strict=True)) / sum(own)
    torch.testing.assert_close(sum(text) / 2, weighted, rtol=1e-10, atol=1e-10)


def test_an_objective_that_gives_no_features_sees_its_micro_batch(make_model, make_batch):
    model = train(make_model, ["itm", "itc"], "in_batch")
    assert contrasted_objectives(model.config, model.objectives, ROWS) == ("itc",)
    model.objectives = ObjectiveConfig(recipe=["itm", "mlm"])
    contrasts = contrast_batch(model, micro_batches(global_batch(make_batch, "in_batch"), 2), SEED)
    assert [contrast.outputs for contrast in contrasts] == [{}, {}]


def test_an_objective_of_ones_own_takes_part(make_model, make_batch):
    """Of every pair of captions, by fused tokens of a view of its own and a parameter."""
    view = View("both_masked", image="dropped", text="completion")

    def features(inputs):
        return {
            "cls": inputs.text(view)[:, 0],
            "scale": inputs.network.temperature,
            "detached": inputs.text(view).detach(),
        }

    def contrast(found, options, backend):
        rows = found["cls"] / found["scale"]
        return LossOutput((rows @ found["detached"][:, 0].T).square().mean(), {"rows": torch.tensor(len(rows))})

    register(
        Objective(
            name="own",
            title="of one's own",
            loss=lambda inputs: contrast(features(inputs), inputs.options, inputs.network.backend),
            outputs=(ViewOutputs(view, text=("cls",)),),
            features=features,
            contrast=contrast,
        )
    )
    model = train(make_model, ["mlm", "own"], "in_batch")
    batch = global_batch(make_batch, "in_batch")
    assert_close(accumulated(model, micro_batches(batch, 4), contrastive=True), one_batch(model, batch))
    with pytest.raises(ValueError, match=r"features, contrast: objective 'half' has one of them, expected both"):
        Objective(name="half", title="", loss=contrast, outputs=(ViewOutputs(view, text=("cls",)),), contrast=contrast)


def test_a_contrastive_batch_needs_places(make_model, make_batch):
    model = train(make_model, "scl", "in_batch")
    with pytest.raises(ValueError, match="expected 'place' too: a contrastive batch takes each row twice"):
        contrast_batch(model, [make_batch()] * 2, SEED)
    with pytest.raises(ValueError, match="batches: got none"):
        contrast_batch(model, [], SEED)
    model.execution.backend = "flash"
    with pytest.raises(UserError, match=r"got 'flash' for a contrastive batch, .* set run\.backend=auto"):
        contrast_batch(model, [global_batch(make_batch, "in_batch")] * 2, SEED)


def test_a_contrastive_batch_under_autocast(make_model, make_batch):
    model = train(make_model, "scl", "in_batch").float()
    batch = {
        name: value.float() if value.is_floating_point() else value
        for name, value in global_batch(make_batch, "in_batch").items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        ours = accumulated(model, micro_batches(batch, 2), contrastive=True)
        expected = one_batch(model, batch)
    # Products of other shapes round otherwise.
    assert_close(ours[:1], expected[:1], 2e-2)
    for name, gradient in expected[1].items():
        cosine = torch.cosine_similarity(ours[1][name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.98 or gradient.norm() < 1e-3, (name, float(cosine))


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("step", [StepConfig(), StepConfig.published()], ids=["planned", "separate"])
def test_micro_batches_with_only_true_or_only_false_images(make_model, make_batch, row, step):
    model = train(make_model, ["itm"], "in_batch")
    batch = global_batch(make_batch, "in_batch")
    # Separate passes give the last layer all tokens, which drop other probabilities than the few that are read.
    model.step = StepConfig(share_encodings=step.share_encodings, prune_last_layer=step.prune_last_layer)
    expected, gradients = values_of(model, batch)
    model.step = step
    found, of_row = values_of(model, part_of(batch, [row]))
    assert found and of_row.keys() == gradients.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)
