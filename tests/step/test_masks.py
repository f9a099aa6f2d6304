"""The masks of a step: capacities, which images are false, which positions are read."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sclkern import ObjectiveConfig
from sclkern.random import random_words
from sclkern.step.masks import negative_images, selected_positions
from step_testing import masks_of


@given(
    lengths=st.lists(st.integers(2, 16), min_size=2, max_size=6),
    more=st.integers(0, 4),
    ratios=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    seed=st.integers(0, 2**62),
    mode=st.sampled_from(["default", "published"]),
)
def test_no_row_selects_more_than_its_capacity(tiny, make_batch, lengths, more, ratios, seed, mode):
    options = {"mlm_ratio": ratios[0], "text_mask_ratio": ratios[1]}
    if mode == "published":
        options |= {"mlm_mask": "published", "text_mask": "published"}
    tiny.objectives = ObjectiveConfig(**options)
    batch = make_batch(len(lengths), lengths=lengths, width=min(max(lengths) + more, 16))
    masks = masks_of(tiny, batch, seed)
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


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_half_the_pairs_belong_together(tiny, make_batch, rows):
    tiny.objectives = ObjectiveConfig()
    batch = make_batch(rows)
    labels = torch.stack([masks_of(tiny, batch, seed).itm_labels for seed in range(400)])
    assert (labels.sum(1) == rows // 2).all()
    share, chance = labels.double().mean(0), (rows // 2) / rows
    bound = 4.5 * math.sqrt(chance * (1 - chance) / 400)
    assert ((share - chance).abs() < bound).all(), (share, chance, bound)


def draw_negatives(tiny, rows, draws, similarity=None, image_id=None):
    """(draws, rows) indices from keys of different seeds."""
    masks = masks_of(tiny, {"text_ids": torch.zeros(rows, 4).long(), "text_mask": torch.ones(rows, 4)}, 0)
    masks = dataclasses.replace(masks, image_id=image_id)
    keys = random_words((draws, rows), seed=3, stream=9, device="cpu")[0]
    return torch.stack([negative_images(dataclasses.replace(masks, itm_keys=row), similarity) for row in keys])


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


@pytest.mark.parametrize("scale", [None, 0.0, 1e4])
def test_a_false_image_in_the_batch_is_never_of_the_same_picture(tiny, scale):
    torch.manual_seed(0)
    image_id = torch.tensor([4, 9, 4, 4, 7, 9])
    # The same picture is as similar as the own, as it is when the contrast has been learned.
    same = image_id[:, None] == image_id
    similarity = None if scale is None else scale * (torch.randn(6, 6) + 5 * same)
    chosen = draw_negatives(tiny, 6, 300, similarity, image_id)
    assert (image_id[chosen] != image_id).all()
    if not scale:
        assert all(set(chosen[:, i].tolist()) == set((~same[i]).nonzero()[:, 0].tolist()) for i in range(6))
    # Without ids that are equal, the same rows as without ids.
    different = draw_negatives(tiny, 6, 300, similarity, torch.arange(6))
    assert torch.equal(different, draw_negatives(tiny, 6, 300, similarity))


@pytest.mark.parametrize("similarity", [None, torch.eye(3)])
def test_a_batch_of_one_picture_takes_another_row(tiny, similarity):
    chosen = draw_negatives(tiny, 3, 200, similarity, torch.tensor([5, 5, 5]))
    assert all(set(chosen[:, i].tolist()) == {0, 1, 2} - {i} for i in range(3))
