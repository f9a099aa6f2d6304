"""What a batch with places must hold, checked before any work is done."""

from __future__ import annotations

import pytest
import torch

from sclkern import ObjectiveConfig
from sclkern.step import check_step, match_labels
from sclkern.step.batch import unread_fault

IN_BATCH, DATASET = ObjectiveConfig(), ObjectiveConfig(itm_negatives="dataset")


@pytest.fixture(scope="module")
def tiny(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture
def batch(make_batch):
    """Four rows, of which the first and the last have a false image."""
    labels = torch.tensor([0, 1, 1, 0])
    return make_batch(4, dtype=torch.float32) | {"place": torch.tensor([4, 5, 6, 7]), "match_labels": labels}


WRONG = [
    ({"place": None}, "match_labels: got it without 'place', expected the place of each row"),
    ({"place": [4, 5, 6]}, r"place: got shape \(3,\), expected \(B,\) = \(4,\)"),
    ({"place": [4, 5, 5, 7]}, "place: got equal places, expected one of its own for each row"),
    ({"place": [-1, 5, 6, 7]}, r"place: got -1 to 7, expected 0 to \d+"),
    ({"match_labels": [0, 2, 1, 0]}, "match_labels: got other values than 0 and 1"),
    (
        {"match_labels": None, "false_place": [5, 6]},
        "without 'match_labels', expected .*match_labels\\(seed, place\\)",
    ),
    ({"false_place": [5]}, "false_place: got 1 rows, expected one for each of the 2 rows whose match_labels are 0"),
    ({"false_place": [5, 9]}, "false_place: got 9, which is no place of this micro-batch, expected false_image too"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_places_that_no_step_takes(tiny, batch, changes, message):
    for name, value in changes.items():
        if value is None:
            del batch[name]
        else:
            batch[name] = torch.tensor(value)
    with pytest.raises(ValueError, match=message):
        check_step(tiny.config, IN_BATCH, batch)


def test_places_of_another_type(tiny, batch):
    for value, message in ((torch.arange(4.0), "place: got torch.float32, expected torch.int64"), ([1], "got list")):
        with pytest.raises(TypeError, match=message):
            check_step(tiny.config, IN_BATCH, batch | {"place": value})


@pytest.mark.parametrize(
    ("image_id", "error", "message"),
    [
        ([3, 3, 1, 2], TypeError, "image_id: got list, expected a tensor"),
        (torch.zeros(4), TypeError, "image_id: got torch.float32, expected torch.int64; give image_id.long()"),
        (torch.zeros(3).long(), ValueError, r"image_id: got shape \(3,\), expected \(B,\) = \(4,\)"),
        (torch.zeros(4, device="meta").long(), ValueError, "image_id: got device meta, expected that of text_ids, cpu"),
    ],
)
def test_image_ids_that_no_step_takes(tiny, make_batch, image_id, error, message):
    batch = make_batch(4, dtype=torch.float32)
    with pytest.raises(error, match=message):
        check_step(tiny.config, IN_BATCH, batch | {"image_id": image_id})
    check_step(tiny.config, IN_BATCH, batch | {"image_id": torch.zeros(4).long()})


def test_false_images_have_a_row_for_each_label_that_is_0(tiny, batch):
    for objectives in (IN_BATCH, DATASET):
        check_step(tiny.config, objectives, batch | {"false_image": batch["image"][:2]})
        with pytest.raises(ValueError, match="false_image: got 4 rows, expected one for each of the 2 rows"):
            check_step(tiny.config, objectives, batch | {"false_image": batch["image"]})
    with pytest.raises(ValueError, match=r"false_image: got shape .* expected that of image"):
        check_step(tiny.config, IN_BATCH, batch | {"false_image": torch.randn(2, 1, 3, 32, 32)})
    # Hard negatives are other rows of the micro-batch, whatever the loader brings.
    check_step(tiny.config, ObjectiveConfig(itm_negatives="hard"), batch | {"false_image": batch["image"]})


def test_one_row_with_its_false_image_is_a_batch(tiny, make_batch):
    one = make_batch(1, dtype=torch.float32) | {"place": torch.tensor([3]), "match_labels": torch.tensor([0])}
    check_step(tiny.config, IN_BATCH, one | {"false_image": one["image"]})
    with pytest.raises(ValueError, match="got 1 row, expected at least 2"):
        check_step(tiny.config, IN_BATCH, one)


def test_labels_are_drawn_where_the_batch_has_none(tiny, batch):
    tiny.objectives = ObjectiveConfig(recipe=["itm"], itm_negatives="hard")
    drawn = batch | {"match_labels": match_labels(5, batch["place"])}
    del batch["match_labels"]
    assert torch.equal(tiny(batch, seed=5).itm, tiny(drawn, seed=5).itm)


def test_what_cannot_be_read_makes_the_losses_nan(batch, monkeypatch):
    monkeypatch.setattr("sclkern.step.batch.may_read", lambda _: False)
    for more, is_right in (
        ({"false_place": torch.tensor([5, 6])}, True),
        ({"false_place": torch.tensor([5, 9])}, False),
        ({"false_place": torch.tensor([5, 9]), "false_image": batch["image"][:2]}, True),
        ({"false_image": batch["image"]}, False),
    ):
        assert bool(unread_fault(batch | more) == 0) is is_right, more
