"""Which images are false, and which image takes their place: functions of (seed, place in the global batch) alone."""

import pytest
import torch

from sclkern.random import mix_seed, step_seed
from sclkern.step import false_places, match_labels


@pytest.mark.parametrize("seed", [0, 7, 2**62, torch.tensor([3])])
def test_one_of_two_neighbours_has_a_false_image(seed):
    labels = match_labels(seed, torch.arange(1000))
    assert set(labels.tolist()) == {0, 1}
    assert (labels.view(-1, 2).sum(1) == 1).all()
    # Which of the two is a fair draw: within 5 standard deviations.
    assert abs(int(labels[::2].sum()) - 250) < 56


def test_labels_and_false_places_do_not_depend_on_the_slice():
    place = torch.arange(64)
    labels, false = match_labels(5, place), false_places(5, place, 64)
    for part in (place[:7], place[7:], place[::3], place.flip(0)):
        assert torch.equal(match_labels(5, part), labels[part])
        assert torch.equal(false_places(5, part, 64), false[part])
    assert not torch.equal(match_labels(6, place), labels)
    assert not torch.equal(false_places(6, place, 64), false)


def test_a_false_place_is_any_other_with_equal_chance():
    place, draws = torch.arange(5), 2000
    chosen = torch.stack([false_places(mix_seed(9, draw), place, 5) for draw in range(draws)])
    for own in range(5):
        counts = chosen[:, own].bincount(minlength=5)
        assert counts[own] == 0
        others = counts[torch.arange(5) != own].double()
        # Chi-square with 3 degrees of freedom: 25 has a chance of 1e-5.
        assert ((others - draws / 4) ** 2 / (draws / 4)).sum() < 25


def test_a_single_row_has_no_false_place():
    with pytest.raises(ValueError, match=r"global_batch: got 1, expected at least 2 .*itm_negatives='dataset'"):
        false_places(0, torch.zeros(1, dtype=torch.int64), 1)


def test_the_seed_of_a_step():
    assert step_seed(3, 4) == mix_seed(3, 1, 4)
    assert len({step_seed(seed, step) for seed in range(3) for step in range(50)}) == 150
