"""What a step refuses before any work is done."""

from __future__ import annotations

import pytest

from sclkern import ObjectiveConfig
from step_testing import build


@pytest.mark.parametrize("itm_negatives", ["in_batch", "hard"])
def test_one_row_has_no_negative_image_in_the_batch(make_model, make_batch, itm_negatives):
    model = make_model(ObjectiveConfig(itm_negatives=itm_negatives))
    with pytest.raises(ValueError, match=r"batch: got 1 row, expected at least 2 .*use itm_negatives='dataset'"):
        model(make_batch(1), seed=0)


def test_one_row_is_enough_with_negative_images_from_the_dataset(make_model, make_batch):
    model = make_model(ObjectiveConfig(itm_negatives="dataset"))
    assert model(make_batch(1, false_image=True), seed=0).total.isfinite()


@pytest.mark.parametrize("itm_negatives", ["dataset", "published"])
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


def test_captions_that_do_not_fit_are_refused(make_model, make_batch):
    model, batch = build(make_model, make_batch, ObjectiveConfig())
    batch["text_tokens"] = int(batch["text_mask"].sum()) - 1
    with pytest.raises(ValueError, match=r"batch: got text_tokens \d+, expected room for the \d+ of text_mask"):
        model(batch, seed=0)
