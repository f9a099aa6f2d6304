"""Batches that say their places: however a global batch is cut, packed or ordered, each row gets the same numbers."""

from __future__ import annotations

import pytest
import torch

from sclkern import ObjectiveConfig
from sclkern.step import (
    StepConfig,
    contrast_batch,
    false_places,
    make_plan,
    match_labels,
    target_counts,
)
from sclkern.step.masks import draw_prepared
from step_testing import FRAMES, RECIPES

ROWS, SEED = 8, 11
NEGATIVES = ["dataset", "in_batch"]
# Lengths of captions and images that differ, so that each cut pads to another width.
LENGTHS = [10, 7, 12, 5, 3, 9, 16, 4]


def global_batch(make_batch, negatives, frames=None, *, brought=True):
    """A global batch as a loader gives it, with places that do not start at 0."""
    batch = make_batch(ROWS, lengths=LENGTHS, width=16, frames=frames)
    place = torch.arange(ROWS) + 0
    labels = match_labels(SEED, place)
    batch |= {"place": place, "match_labels": labels}
    if negatives == "in_batch":
        batch["false_place"] = false_places(SEED, place[labels == 0], ROWS)
    if negatives == "dataset":
        generator = torch.Generator().manual_seed(5)
        shape = (int((labels == 0).sum()), *batch["image"].shape[1:])
        batch["false_image"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif brought:
        batch["false_image"] = batch["image"][batch["false_place"]]
    return batch


def part_of(batch, rows, width=None):
    """Some rows of a global batch, in an order, padded to their own width."""
    rows = torch.as_tensor(rows)
    of_false = torch.full((ROWS,), -1)
    of_false[batch["match_labels"] == 0] = torch.arange(int((batch["match_labels"] == 0).sum()))
    false = of_false[rows]
    false = false[false >= 0]
    width = width or int(batch["text_mask"][rows].sum(1).max())
    part = {name: batch[name][rows] for name in ("image", "text_ids", "text_mask", "place", "match_labels")}
    part |= {name: part[name][:, :width] for name in ("text_ids", "text_mask")}
    return part | {name: batch[name][false] for name in ("false_image", "false_place") if name in batch}


def train(make_model, recipe, negatives, frames=None, **options):
    objectives = ObjectiveConfig(recipe=recipe, itm_negatives=negatives, **options)
    return make_model(objectives, max_frames=frames or 0, dropout=0.1).train()


def values_of(model, batch):
    """What the losses read of each row, by its place, with the gradients of a sum over rows."""
    from sclkern.step import losses as module

    found = {}

    def keep(objectives, outputs, fault):
        raise StopIteration

    network, objectives = model, model.objectives
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


# -- targets, and the contrastive batch --------------------------------------------------------------------------------


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_batch(model, batch):
    model.zero_grad()
    losses = model(batch, seed=SEED)
    losses.total.backward()
    return {name: loss.detach() for name, loss in losses.named().items()}, gradients_of(model)


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


def assert_close(ours, theirs):
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = float(value.abs().max()) + 1e-3
            torch.testing.assert_close(
                found[name] / scale, value / scale, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_contrastive_batch_equals_one_big_batch(make_model, make_batch, recipe, frames, negatives, accumulation):
    model = train(make_model, recipe, negatives, frames)
    batch = global_batch(make_batch, negatives, frames)
    size = ROWS // accumulation
    parts = [part_of(batch, range(start, start + size)) for start in range(0, ROWS, size)]
    if accumulation == 2:
        model.step = StepConfig(checkpoint_blocks=True)
    ours = accumulated(model, parts, contrastive=True)
    model.step = StepConfig()
    expected = one_batch(model, batch)
    assert "temperature" in expected[1]
    assert_close(ours, expected)
