"""Captions padded anywhere, and batches that no step takes."""

from __future__ import annotations

import sys

import pytest
import torch

from sclkern import ObjectiveConfig
from sclkern.models import captions
from sclkern.step import CapturedStep, StepConfig, check_step, draw_masks, run_step, take_step
from sclkern.step import batch as step_batch
from step_testing import assert_same, build

LENGTHS = [5, 3, 1, 7]


def placed(batch, places, padding=1):
    """The batch with its captions at other places: "left", or with "holes"."""
    ids, mask = batch["text_ids"], batch["text_mask"]
    width = ids.shape[1] + 3
    new_ids, new_mask = torch.full((len(ids), width), padding), torch.zeros(len(ids), width, dtype=torch.bool)
    for row, (caption, tokens) in enumerate(zip(ids, mask, strict=True)):
        count = int(tokens.sum())
        if places == "left":
            columns = torch.arange(width - count, width)
        elif places == "right":
            columns = torch.arange(count)
        else:
            columns = torch.randperm(width, generator=torch.Generator().manual_seed(row))[:count].sort().values
        new_ids[row, columns], new_mask[row, columns] = caption[tokens], True
    return {**batch, "text_ids": new_ids, "text_mask": new_mask}


def losses_and_gradients(model, batch):
    model.zero_grad()
    losses = model(batch, seed=3)
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.named().items()}, gradients


@pytest.fixture
def unread(monkeypatch):
    """Values cannot be read, as on a GPU."""
    for module in (captions, step_batch, sys.modules["sclkern.ops.packed_attention"]):
        monkeypatch.setattr(module, "may_read", lambda tensor: False)


@pytest.fixture(params=["read", "unread"])
def reading(request):
    if request.param == "unread":
        request.getfixturevalue("unread")


@pytest.mark.parametrize("objectives", [ObjectiveConfig("glscl"), ObjectiveConfig.published("glscl")])
@pytest.mark.parametrize("pack", [True, False])
def test_padding_may_stand_anywhere(make_model, make_batch, reading, objectives, pack):
    model, batch = build(make_model, make_batch, objectives, dropout=0.0, lengths=LENGTHS)
    model.step = StepConfig(pack=pack)
    expected = losses_and_gradients(model, placed(batch, "right"))
    # Padding of another id, too: that of <s>, of a word.
    for places, padding in (("left", 1), ("left", 0), ("holes", 1), ("holes", 77), ("right", 119)):
        assert_same(losses_and_gradients(model, placed(batch, places, padding)), expected)


def test_padding_anywhere_with_room_for_the_tokens_alone(make_model, make_batch, reading):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), dropout=0.0, lengths=LENGTHS)
    expected = losses_and_gradients(model, placed(batch, "right"))
    tight = {**placed(batch, "holes", 5), "text_tokens": sum(LENGTHS)}
    assert_same(losses_and_gradients(model, tight), expected)


def test_masks_drawn_and_run_apart(make_model, make_batch, reading):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), dropout=0.0, lengths=LENGTHS)
    left = placed(batch, "left")
    arguments = model, model.objectives, model.step
    masks = draw_masks(model.config, model.objectives, left, 3)
    ours, expected = run_step(*arguments, left, masks), take_step(*arguments, placed(batch, "right"), 3)
    for name, loss in expected.named().items():
        torch.testing.assert_close(ours.named()[name], loss)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16, torch.float64])
def test_masks_of_ones_and_zeros(make_model, make_batch, reading, dtype):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), dropout=0.0, lengths=LENGTHS)
    expected = losses_and_gradients(model, batch)
    assert_same(losses_and_gradients(model, {**batch, "text_mask": batch["text_mask"].to(dtype)}), expected)


def change(**entries):
    return lambda batch: {**batch, **{name: make(batch) for name, make in entries.items()}}


def with_id(value, row, column):
    def make(batch):
        ids = batch["text_ids"].clone()
        ids[row, column] = value
        return ids

    return change(text_ids=make)


def without_tokens(*rows):
    def make(batch):
        mask = batch["text_mask"].clone()
        mask[list(rows)] = False
        return mask

    return change(text_mask=make)


def additive(batch):
    return torch.where(batch["text_mask"], 0.0, -10000.0)


# What is wrong with a batch by the values that it holds: refused where they may be read, else the losses are NaN.
VALUES = [
    (
        without_tokens(2),
        "text_mask: got no token in caption 2, expected True or 1 at one or more in each; an empty text",
    ),
    (without_tokens(0, 1, 2, 3), "text_mask: got no token in caption 0"),
    (
        change(text_mask=additive),
        "text_mask: got the value -10000.0, expected 1 .* of an additive mask, give mask == 0",
    ),
    (change(text_mask=lambda b: 2 * b["text_mask"].long()), "text_mask: got the value 2, expected 1 for a token"),
    (change(text_mask=lambda b: b["text_mask"] * 0.5), "text_mask: got the value 0.5"),
    (change(text_tokens=lambda b: 15), r"batch: got text_tokens 15, expected room for the 16 of text_mask"),
]

# What is wrong by shape or dtype, or by ids, which an embedding refuses on a GPU.
FORMS = [
    (
        with_id(120, 1, 1),
        r"text_ids: got 120, expected 0 to 119 \(vocab_size - 1\), in padding too, whose id is pad_id 1",
    ),
    (with_id(-1, 0, 0), "text_ids: got -1, expected 0 to 119"),
    (with_id(-100, 1, 6), "text_ids: got -100, expected 0 to 119"),
    (with_id(2**40, 3, 2), "text_ids: got 1099511627776, expected 0 to 119"),
]
SHAPES = [
    (
        lambda b: {k: v for k, v in b.items() if k != "text_ids"},
        r"got keys \['image', 'text_mask'\], expected 'text_ids'",
    ),
    (lambda b: {k: v for k, v in b.items() if k != "image"}, r"batch: got keys .*, expected 'image' too"),
    (lambda b: {}, "expected 'image' too"),
    (change(text_ids=lambda b: b["text_ids"].int()), "text_ids: got torch.int32, expected torch.int64"),
    (change(text_ids=lambda b: b["text_ids"].float()), "text_ids: got torch.float32, expected torch.int64"),
    (change(text_ids=lambda b: b["text_ids"].tolist()), r"text_ids: got list, expected a tensor \(B, L\)"),
    (change(text_mask=lambda b: None), "text_mask: got NoneType, expected a tensor"),
    (change(text_mask=lambda b: b["text_mask"][:, 1:]), r"got shapes \(4, 7\) and \(4, 6\), expected both"),
    (change(text_mask=lambda b: b["text_mask"][:, None, None]), r"got shapes \(4, 7\) and \(4, 1, 1, 7\)"),
    (
        change(text_ids=lambda b: b["text_ids"][0], text_mask=lambda b: b["text_mask"][0]),
        r"got shapes \(7,\) and \(7,\)",
    ),
    (
        change(text_ids=lambda b: b["text_ids"][:, :0], text_mask=lambda b: b["text_mask"][:, :0]),
        r"text_ids: got shape \(4, 0\), expected one token or more",
    ),
    (
        change(text_ids=lambda b: torch.ones(4, 17).long(), text_mask=lambda b: torch.ones(4, 17).bool()),
        "text_ids: got 17 tokens, expected at most max_text_len 16; cut captions",
    ),
    (
        change(image=lambda b: b["image"][..., :24, :24]),
        r"image: got shape \(4, 3, 24, 24\), expected .* S = 32 \(image_s",
    ),
    (change(image=lambda b: b["image"][:, :1]), r"image: got shape \(4, 1, 32, 32\)"),
    (change(image=lambda b: b["image"].movedim(1, 3)), r"image: got shape \(4, 32, 32, 3\)"),
    (change(image=lambda b: torch.cat([b["image"]] * 2, 1)), r"image: got shape \(4, 6, 32, 32\)"),
    (change(image=lambda b: b["image"][0]), r"image: got shape \(3, 32, 32\)"),
    (change(image=lambda b: b["image"][:, None].expand(-1, 2, -1, -1, -1)), "image: got 2 frames, expected 1 to 1"),
    (change(image=lambda b: b["image"][:, None][:, :0]), "image: got 0 frames, expected 1 to 1"),
    (change(image=lambda b: b["image"].to(torch.uint8)), "image: got torch.uint8, expected a floating dtype; scale"),
    (change(image=lambda b: b["image"].numpy()), "image: got ndarray, expected a tensor"),
    (change(image=lambda b: b["image"][:3]), "batch: got different numbers of rows"),
    (change(text_ids=lambda b: b["text_ids"][:3], text_mask=lambda b: b["text_mask"][:3]), "different numbers of rows"),
    (change(image=lambda b: b["image"].to("meta")), r"batch: got devices \{'image': 'meta', 'text_ids': 'cpu'"),
    (
        change(text_mask=lambda b: b["text_mask"].to("meta")),
        "text_mask: got device meta, expected that of text_ids, cpu",
    ),
    (change(text_tokens=lambda b: torch.tensor(40)), "text_tokens: got Tensor, expected an int, which the host knows"),
    (change(text_tokens=lambda b: 3), "batch: got text_tokens 3, expected room for "),
    (change(text_tokens=lambda b: -1), "batch: got text_tokens -1, expected room for "),
    (change(text_tokens=lambda b: 40.0), "text_tokens: got float, expected an int"),
    (change(text_tokens=lambda b: True), "text_tokens: got bool, expected an int"),
]


@pytest.fixture
def no_work(monkeypatch):
    """A model that works before it has refused a batch fails."""

    def fail(*_, **__):
        raise AssertionError("work was done")

    for name in ("draw_prepared", "encode", "make_plan"):
        monkeypatch.setattr(f"sclkern.step.losses.{name}", fail)


@pytest.mark.parametrize(("spoil", "message"), VALUES + FORMS + SHAPES)
def test_what_no_step_takes_is_refused_before_any_work(make_model, make_batch, no_work, spoil, message):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), lengths=LENGTHS)
    spoilt = spoil(batch)
    with pytest.raises((ValueError, TypeError), match=message):
        model(spoilt, seed=0)
    with pytest.raises((ValueError, TypeError), match=message):
        check_step(model.config, model.objectives, spoilt)


@pytest.mark.parametrize(("spoil", "message"), SHAPES)
def test_shapes_are_checked_where_values_are_not(make_model, make_batch, no_work, unread, spoil, message):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), lengths=LENGTHS)
    with pytest.raises((ValueError, TypeError), match=message):
        model(spoil(batch), seed=0)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("spoil", "message"), VALUES)
def test_the_losses_are_nan_where_values_cannot_be_read(make_model, make_batch, unread, pack, spoil, message):
    model, batch = build(make_model, make_batch, ObjectiveConfig("glscl"), lengths=LENGTHS)
    model.step = StepConfig(pack=pack)
    assert all(loss.isfinite() for loss in model(batch, seed=0).named().values())
    assert all(loss.isnan() for loss in model(spoil(batch), seed=0).named().values())


def test_a_model_on_another_device_is_named(make_model, make_batch):
    model = make_model().to("meta")
    with pytest.raises(ValueError, match="batch: got device cpu, expected that of the model, meta"):
        model(make_batch(), seed=0)


def test_negative_images_are_checked_as_images_are(make_model, make_batch):
    model = make_model(ObjectiveConfig(itm_negatives="dataset"), max_frames=3)
    batch = make_batch(false_image=True)
    for false_image, message in (
        (batch["false_image"].to(torch.uint8), "false_image: got torch.uint8"),
        (batch["false_image"][..., :16], r"false_image: got shape \(4, 3, 32, 16\)"),
        (batch["false_image"][:, None].expand(-1, 2, -1, -1, -1), "expected that of image, "),
        (batch["false_image"][:2], "different numbers of rows"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model({**batch, "false_image": false_image}, seed=0)


def test_a_captured_step_checks_its_batch(make_model, make_batch):
    captured = object.__new__(CapturedStep)
    captured.model = captured.network = make_model()
    with pytest.raises(ValueError, match="text_mask: got no token in caption 2"):
        captured(without_tokens(2)(make_batch()), 0)


def test_values_are_read_on_request(make_model, make_batch, monkeypatch):
    """``SCLKERN_DEBUG=1`` reads on a GPU what a CPU always reads; tracing reads nothing."""
    model, batch = make_model(), without_tokens(1)(make_batch())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert model(batch, seed=0).total.isnan()


def test_compiled_steps_take_captions_padded_anywhere(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(("mlm", "mlsc")), dropout=0.0, lengths=LENGTHS)
    arguments = model, model.objectives, StepConfig(pack=False)
    masks = draw_masks(model.config, model.objectives, placed(batch, "right"), 3)
    expected = run_step(*arguments, placed(batch, "right"), masks)
    compiled = torch.compile(run_step, backend="eager", fullgraph=True)
    for places in ("right", "left", "holes"):
        torch.testing.assert_close(compiled(*arguments, placed(batch, places), masks).total, expected.total)


# -- the network alone -------------------------------------------------------------------------------------------------


def test_features_of_captions_padded_anywhere(make_model, make_batch, reading):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), lengths=LENGTHS)
    image = model.encode_image(batch["image"])

    def features(batch):
        mask = batch["text_mask"]
        text = model.encode_text(batch["text_ids"], mask.long())
        fused = model.run_fusion(text, mask.float(), image)
        first = captions.first_token(text, mask)
        return {"text": text[mask], "cls": first, "fused": fused.text[mask], "pooled": model.pool(*fused.cls)}

    expected = features(placed(batch, "right"))
    for places, padding in (("left", 1), ("left", 0), ("holes", 119)):
        for name, value in features(placed(batch, places, padding)).items():
            torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(("spoil", "message"), VALUES[:5] + FORMS)
def test_encode_text_checks_captions(make_model, make_batch, spoil, message):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), lengths=LENGTHS)
    spoilt = spoil(batch)
    with pytest.raises(ValueError, match=message.split(":", 1)[1].split(",")[0]):
        model.encode_text(spoilt["text_ids"], spoilt["text_mask"])


def test_run_fusion_checks_its_mask(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig(), lengths=LENGTHS)
    image, text = model.encode_image(batch["image"]), model.encode_text(batch["text_ids"], batch["text_mask"])
    with pytest.raises(ValueError, match=r"text_mask: got the value -10000.0, expected 1"):
        model.run_fusion(text, additive(batch), image)
    with pytest.raises(ValueError, match=r"text_mask: got shape \(4, 6\), expected \(B, L\) = \(4, 7\)"):
        model.run_fusion(text, batch["text_mask"][:, 1:], image)
