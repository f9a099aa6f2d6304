from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.random import random_words
from sclkern.reference import MaskedText
from sclkern.step import draw_masks, negative_images, run_step, selected_positions, take_rows

RECIPES = ["scl", "glscl"]
PICTURES = [pytest.param(None, id="images"), pytest.param(3, id="clips")]


def needs_false_image(objectives):
    return objectives.itm_negatives in ("dataset", "reference")


def build(make_model, make_batch, objectives, frames=None, **batch_options):
    model = make_model(objectives, max_frames=frames or 0)
    return model, make_batch(frames=frames, false_image=needs_false_image(objectives), **batch_options)


def run(model, batch, masks):
    """Losses as floats, and the gradients of the total."""
    model.zero_grad()
    losses = run_step(model, batch, masks)
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.named().items()}, gradients


def assert_same(ours, theirs):
    for kind, a, b in zip(("losses", "gradients"), ours, theirs, strict=True):
        assert a.keys() == b.keys(), (kind, a.keys() ^ b.keys())
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


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
        return model.fuse(model.encode_text(text_ids, mask), mask, model.encode_image(pixels, **masking))

    text, picture = model.project(model.encode_text(ids, mask), model.encode_image(image))
    itc = contrast(picture, text, model.temperature)

    pixels = image.clone()
    for i in range(rows):
        if not masks.itm_labels[i]:
            other = (i + 1 + (int(masks.itm_keys[i]) * (rows - 1) >> 32)) % rows
            pixels[i] = batch["false_image"][i] if needs_false_image(options) else image[other]
    itm = F.cross_entropy(model.itm_head(model.pool(fused(pixels=pixels))), masks.itm_labels)

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


@pytest.mark.parametrize("frames", PICTURES)
@pytest.mark.parametrize("itm_negatives", ["in_batch", "dataset"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_and_gradients_equal_the_definition(make_model, make_batch, recipe, itm_negatives, frames):
    objectives = ObjectiveConfig(recipe=recipe, itm_negatives=itm_negatives, encodings="shared")
    model, batch = build(make_model, make_batch, objectives, frames)
    masks = draw_masks(model, batch, 5)
    ours = run(model, batch, masks)
    model.zero_grad()
    expected = restated(model, batch, masks)
    expected["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(ours, ({name: loss.detach() for name, loss in expected.items()}, gradients))


@pytest.mark.parametrize("frames", PICTURES)
@pytest.mark.parametrize("itm_negatives", ["in_batch", "hard", "dataset"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_shared_encodings_equal_separate_ones(make_model, make_batch, recipe, itm_negatives, frames):
    objectives = ObjectiveConfig(recipe=recipe, itm_negatives=itm_negatives)
    model, batch = build(make_model, make_batch, objectives, frames)
    masks = draw_masks(model, batch, 6)
    shared = run(model, batch, masks)
    model.objectives = dataclasses.replace(objectives, encodings="reference")
    assert_same(shared, run(model, batch, masks))


def test_shared_encodings_encode_each_variant_once(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl"))
    calls = {"text": 0, "vision": 0}
    for name in calls:
        getattr(model, name).register_forward_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    model(batch, seed=0)
    # Text: complete, mlm, completion. Image: complete, dropped, token-masked.
    assert calls == {"text": 3, "vision": 3}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_totals_gradient_is_the_weighted_sum_of_the_losses_gradients(make_model, make_batch, recipe):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe=recipe, itc_weight=0.7, mltc_weight=0.3))
    losses = run_step(model, batch, draw_masks(model, batch, 7)).named()
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
    masks = draw_masks(model, batch, 0)
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
    _, gradients = run(model, batch, draw_masks(model, batch, 1))
    missing = {name for name, _ in model.named_parameters()} - gradients.keys()
    assert missing == ({"vision.mask_token"} if recipe == "scl" else set())


@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_options_run_and_are_finite(make_model, make_batch, recipe):
    model, batch = build(make_model, make_batch, ObjectiveConfig.reference(recipe), frames=2)
    losses, gradients = run(model, batch, draw_masks(model, batch, 3))
    assert all(loss.isfinite() for loss in losses.values()), losses
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_nothing_to_complete_costs_nothing_and_breaks_nothing(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl"), lengths=[2, 2, 2, 2])
    losses, gradients = run(model, batch, draw_masks(model, batch, 3))
    assert losses["mlm"] == 0
    assert all(loss.isfinite() for loss in losses.values()), losses
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_reference_drops_an_empty_token_completion(make_model, make_batch):
    objectives = ObjectiveConfig(recipe="glscl", empty_selections="reference")
    model, batch = build(make_model, make_batch, objectives, lengths=[2, 2, 2, 2])
    losses = run_step(model, batch, draw_masks(model, batch, 3))
    assert losses.metrics["mltc_text"] == 0
    assert losses.mltc.isfinite()
    assert losses.mlm.isnan()


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
    narrow_run = run(model, batch, draw_masks(model, batch, 8))
    assert_same(narrow_run, run(model, wide, draw_masks(model, wide, 8)))


def test_what_the_encoder_leaves_at_padding_is_never_read(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl"))
    masks = draw_masks(model, batch, 8)
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


@pytest.mark.parametrize("frames", PICTURES)
def test_the_order_of_the_batch_does_not_matter(make_model, make_batch, frames):
    # False images come with the batch here: one chosen in the batch would follow the row, not the sample.
    model, batch = build(make_model, make_batch, ObjectiveConfig(recipe="glscl", itm_negatives="dataset"), frames)
    masks = draw_masks(model, batch, 9)
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


# -- masks and false images --------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(2, 16), min_size=2, max_size=6),
    more=st.integers(0, 4),
    ratios=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    seed=st.integers(0, 2**62),
    mode=st.sampled_from(["default", "reference"]),
)
def test_no_row_selects_more_than_its_capacity(tiny, make_batch, lengths, more, ratios, seed, mode):
    options = {"mlm_ratio": ratios[0], "text_mask_ratio": ratios[1]}
    if mode == "reference":
        options |= {"mlm_mask": "reference", "text_mask": "reference"}
    tiny.objectives = ObjectiveConfig(**options)
    batch = make_batch(len(lengths), lengths=lengths, width=max(lengths) + more)
    masks = draw_masks(tiny, batch, seed)
    assert masks.mlm.selected.sum(1).max() <= masks.mlm_capacity
    assert masks.completion.selected.sum(1).max() <= masks.completion_capacity
    for text, capacity in ((masks.mlm, masks.mlm_capacity), (masks.completion, masks.completion_capacity)):
        positions, valid = selected_positions(text.selected, capacity)
        assert positions.shape == (len(lengths), capacity)
        found = [set(p[v].tolist()) for p, v in zip(positions, valid, strict=True)]
        assert found == [set(row.nonzero().flatten().tolist()) for row in text.selected]


@pytest.fixture(scope="module")
def tiny(make_model):
    return make_model()


def test_selected_positions_are_ascending_and_marked_valid():
    selected = torch.tensor([[False, True, False, True, True], [False, False, False, False, True]])
    positions, valid = selected_positions(selected, 3)
    assert positions[0].tolist() == [1, 3, 4]
    assert positions[1, 0] == 4
    assert valid.tolist() == [[True, True, True], [True, False, False]]


def test_take_rows_takes_them():
    x = torch.arange(12.0).view(2, 3, 2)
    assert take_rows(x, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_half_the_pairs_belong_together(tiny, make_batch, rows):
    tiny.objectives = ObjectiveConfig()
    batch = make_batch(rows)
    labels = torch.stack([draw_masks(tiny, batch, seed).itm_labels for seed in range(400)])
    assert (labels.sum(1) == rows // 2).all()
    share, chance = labels.double().mean(0), (rows // 2) / rows
    bound = 4.5 * math.sqrt(chance * (1 - chance) / 400)
    assert ((share - chance).abs() < bound).all(), (share, chance, bound)


def draw_negatives(tiny, rows, draws, similarity=None):
    """(draws, rows) indices from keys of different seeds."""
    masks = draw_masks(tiny, {"text_ids": torch.zeros(rows, 4).long(), "text_mask": torch.ones(rows, 4)}, 0)
    keys = random_words((draws, rows), seed=3, stream=9, device="cpu")[0]
    return torch.stack([negative_images(tiny, dataclasses.replace(masks, itm_keys=row), similarity) for row in keys])


def test_a_false_image_is_any_other_of_the_batch_with_equal_chance(tiny):
    rows, draws = 5, 2000
    chosen = draw_negatives(tiny, rows, draws)
    for i in range(rows):
        counts = chosen[:, i].bincount(minlength=rows)
        assert counts[i] == 0, counts
        others = counts[torch.arange(rows) != i].double()
        chi_square = ((others - draws / 4) ** 2 / (draws / 4)).sum().item()
        assert chi_square < 21.1, f"row {i}: chi-square {chi_square} of 3 degrees of freedom, {counts.tolist()}"


def test_a_hard_false_image_is_drawn_by_its_similarity(tiny):
    rows, draws = 4, 3000
    similarity = torch.tensor([[9.0, 0, 1, 2], [1, 9, 1, 1], [-3, 2, 9, 2], [0.5, 0, -0.5, 9]])
    chosen = draw_negatives(tiny, rows, draws, similarity)
    for i in range(rows):
        weights = [0.0 if j == i else math.exp(similarity[i, j]) for j in range(rows)]
        expected = torch.tensor(weights, dtype=torch.float64) * draws / sum(weights)
        counts = chosen[:, i].bincount(minlength=rows).double()
        assert counts[i] == 0, counts
        others = torch.arange(rows) != i
        chi_square = ((counts - expected)[others] ** 2 / expected[others]).sum().item()
        assert chi_square < 18.4, f"row {i}: chi-square {chi_square} of 2 degrees of freedom, {counts}, {expected}"


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_a_hard_false_image_is_never_the_own(tiny, rows, scale):
    torch.manual_seed(rows)
    # The own image is the most similar by far, as it is when the contrast has been learned.
    similarity = scale * (torch.randn(rows, rows) + 5 * torch.eye(rows))
    chosen = draw_negatives(tiny, rows, 300, similarity)
    assert (chosen != torch.arange(rows)).all()
    assert chosen.min() >= 0
    assert chosen.max() < rows


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itm_negatives", ["in_batch", "hard"])
def test_one_row_has_no_false_image_in_the_batch(make_model, make_batch, itm_negatives):
    model = make_model(ObjectiveConfig(itm_negatives=itm_negatives))
    with pytest.raises(ValueError, match=r"batch: got 1 row, expected at least 2 .*use itm_negatives='dataset'"):
        model(make_batch(1), seed=0)


def test_one_row_is_enough_with_false_images_from_the_dataset(make_model, make_batch):
    model = make_model(ObjectiveConfig(itm_negatives="dataset"))
    assert model(make_batch(1, false_image=True), seed=0).total.isfinite()


@pytest.mark.parametrize("itm_negatives", ["dataset", "reference"])
def test_dataset_negatives_need_a_false_image(make_model, make_batch, itm_negatives):
    model = make_model(ObjectiveConfig(itm_negatives=itm_negatives))
    with pytest.raises(ValueError, match="expected 'false_image' too"):
        model(make_batch(), seed=0)


@pytest.mark.parametrize("head", ["itm", "mlm", "itc"])
def test_a_missing_head_is_named(make_model, make_batch, head):
    model = make_model(heads=tuple({"itm", "mlm", "itc"} - {head}))
    with pytest.raises(ValueError, match=rf"heads: .*recipe 'scl' needs \['{head}'\] too"):
        model(make_batch(), seed=0)


def test_token_completion_needs_a_mask_token(make_model, make_batch):
    model = make_model(ObjectiveConfig(recipe="glscl"), patch_mask_token=False)
    with pytest.raises(ValueError, match="patch_mask_token: the model has none"):
        model(make_batch(), seed=0)


def test_inputs_of_different_lengths_are_named(make_model, make_batch):
    batch = make_batch()
    batch["image"] = batch["image"][:3]
    with pytest.raises(ValueError, match=r"batch: got different numbers of rows .*'image': 3"):
        make_model()(batch, seed=0)


# -- nothing is read back ----------------------------------------------------------------------------------------------


class HostReadError(AssertionError):
    pass


READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "_unique2"}


class NoHostReads(TorchDispatchMode):
    """Raise at any operation that on a GPU would wait for a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS:
            raise HostReadError(name)
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise HostReadError(f"{name} with a mask")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(monkeypatch):
    def refuse(name):
        def read(*args, **kwargs):
            raise HostReadError(name)

        return read

    with monkeypatch.context() as patch, NoHostReads():
        # These do not pass through a dispatched operation when the tensor is on the host already.
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: x.__setitem__(x > 0, torch.ones(3)),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_guard_sees_a_read(monkeypatch, read):
    with pytest.raises(HostReadError), no_host_reads(monkeypatch):
        read(torch.ones(3))


GUARDED = [
    {"recipe": "scl"},
    {"recipe": "glscl"},
    {"recipe": "glscl", "itm_negatives": "hard"},
    {"recipe": "glscl", "itm_negatives": "dataset", "encodings": "reference"},
    {"recipe": "glscl", "mlm_mask": "reference", "text_mask": "reference", "frame_norm": "reference"},
]


@pytest.mark.parametrize("frames", PICTURES)
@pytest.mark.parametrize("options", GUARDED)
def test_a_training_step_reads_nothing_back(make_model, make_batch, monkeypatch, options, frames):
    model, batch = build(make_model, make_batch, ObjectiveConfig(**options), frames)
    model.train()
    seed = torch.tensor(5)
    with no_host_reads(monkeypatch):
        model(batch, seed=seed).total.backward()


class NoHostTensors(TorchDispatchMode):
    """Raise at any operation on a tensor of the host: a copy to the device would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs))):
            raise HostReadError(f"{function} has a tensor of the host")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", GUARDED)
def test_a_step_on_a_device_copies_nothing_to_it(options):
    objectives = ObjectiveConfig(**options)
    # Fake tensors carry a device and a shape but no data: no GPU is needed, and reading a value raises.
    with FakeTensorMode():
        with torch.device("cuda"):
            model = SCLModel(SCLConfig.preset("tiny").replace(max_frames=2), objectives)
            image, ids = torch.randn(4, 2, 3, 32, 32), torch.zeros(4, 9, dtype=torch.int64)
        batch = {"image": image, "false_image": image, "text_ids": ids, "text_mask": ids + 1}
        with NoHostTensors():
            losses = model(batch, seed=5)
    assert losses.total.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", GUARDED)
def test_a_step_on_a_gpu_never_waits(make_model, make_batch, options):
    model, batch = build(make_model, make_batch, ObjectiveConfig(**options), frames=2)
    model = model.float().cuda().train()
    batch = {name: value.float().cuda() if value.is_floating_point() else value.cuda() for name, value in batch.items()}
    model(batch, seed=4).total.backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch, seed=5).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
