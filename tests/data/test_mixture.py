"""Several sources as one, and the order of a mixture by weight."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sclkern.data import image_ids, open_pairs
from sclkern.data.digest import digest
from sclkern.data.mixture import KindSchedule, MixedPairs, kind_of, mix_pairs
from sclkern.data.order import WeightedOrder
from sclkern.data.sources.arrow import write_pairs
from tiny_run import rows

SIZES, WEIGHTS = (50, 200, 7), (1.0, 2.0, 0.25)


@pytest.fixture
def mixed(tmp_path: Path) -> MixedPairs:
    for name, count in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name / "t.arrow", rows(count))
    folders = [str(tmp_path / name) for name in "ab"]
    return MixedPairs([open_pairs(folder, ["t"]) for folder in folders], folders)


def test_pairs_captions_images_and_names_of_each_source(mixed: MixedPairs, tmp_path: Path) -> None:
    assert (mixed.num_pairs, mixed.num_images, kind_of(mixed)) == (8, 8, "images")
    assert mixed.pair_image.tolist() == list(range(8))
    assert [mixed.caption(pair) for pair in range(8)] == [f"image number {i}" for i in (0, 1, 2, 0, 1, 2, 3, 4)]
    # Equal texts of two sources are one group.
    group = mixed.pair_group
    assert (group[:3] == group[3:6]).all() and len(set(group)) == 5
    assert mixed.image(4).tobytes() == mixed.sources[1].image(1).tobytes()
    assert mixed.image_name(3) == f"{tmp_path / 'b'}: t.arrow row 0 (0)"
    copy = pickle.loads(pickle.dumps(mixed))
    assert copy._groups is None and copy.caption(7) == mixed.caption(7) and copy.digest == mixed.digest


def test_pictures_of_two_sources_are_never_the_same(mixed: MixedPairs) -> None:
    assert not hasattr(mixed, "image_ids") and len(set(image_ids(mixed).tolist())) == 8
    first, second = mixed.sources
    second.image_ids = np.array([5, 5, 0, 1, 1])  # type: ignore[attr-defined]
    assert image_ids(MixedPairs([first, second], ["a", "b"])).tolist() == [0, 1, 2, 8, 8, 3, 4, 4]


def test_names_are_unique_where_two_sources_share_a_folder(mixed: MixedPairs) -> None:
    twice = MixedPairs([mixed.sources[0]] * 2, ["a", "a"])
    assert len({twice.image_name(image) for image in range(6)}) == 6


def test_one_source_is_itself_and_others_give_another_digest(mixed: MixedPairs) -> None:
    first, second = mixed.sources
    assert mix_pairs([first], ["a"]) is first
    digests = {digest(mix_pairs(sources, ["a", "b"])) for sources in ([first, second], [second, first])}
    assert len(digests) == 2


def stream(global_batch: int, steps: int, **changes: object) -> list[tuple[int, int]]:
    order = WeightedOrder(SIZES, WEIGHTS, global_batch, seed=3)
    return [at for step in range(steps) for at in order.at(step, torch.arange(global_batch))]


def source_of(pair: int) -> int:
    return int(np.searchsorted(np.cumsum(SIZES), pair, side="right"))


def test_each_batch_has_the_share_of_each_source() -> None:
    order = WeightedOrder(SIZES, WEIGHTS, 26, seed=0)
    for step in range(100):
        counts = Counter(source_of(pair) for _, pair in order.at(step, torch.arange(26)))
        for source, weight in enumerate(WEIGHTS):
            assert abs(counts[source] - 26 * weight / sum(WEIGHTS)) < 2
    whole = Counter(source_of(pair) for _, pair in stream(26, 1000))
    assert [round(whole[source] / 26000 * sum(WEIGHTS), 2) for source in range(3)] == list(WEIGHTS)


def test_no_pair_of_a_source_comes_again_before_all_have_come() -> None:
    seen = stream(26, 100)
    for source, size in enumerate(SIZES):
        of_source = [(epoch, pair) for epoch, pair in seen if source_of(pair) == source]
        assert [epoch for epoch, _ in of_source] == [number // size for number in range(len(of_source))]
        for epoch in range(len(of_source) // size):
            assert len({pair for number, pair in of_source if number == epoch}) == size


def test_no_batch_has_a_pair_twice_where_epochs_meet() -> None:
    order = WeightedOrder((90, 400), (1, 2), 60, seed=1)
    for step in range(300):
        assert len({pair for _, pair in order.at(step, torch.arange(60))}) == 60


def test_places_of_a_weighted_order_may_be_asked_for_in_any_order() -> None:
    whole = stream(26, 40)
    order = WeightedOrder(SIZES, WEIGHTS, 26, seed=3)
    for step in (39, 0, 17):
        place = torch.randperm(26)
        assert order.at(step, place) == [whole[26 * step + at] for at in place.tolist()]


def test_orders_of_epochs_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    ordered = WeightedOrder._ordered
    monkeypatch.setattr(WeightedOrder, "_ordered", lambda self, *at: made.append(at) or ordered(self, *at))
    stream(26, 60)
    assert len(made) == len(set(made))


@pytest.mark.parametrize("share", [0.25, 1 / 3, 0.9])
def test_kinds_alternate_by_weight(share: float) -> None:
    schedule = KindSchedule({"images": 1 - share, "clips": share}, seed=5)
    kinds = [schedule.at(step) for step in range(400)]
    clips = [kind == "clips" for kind, _ in kinds]
    for start in range(0, 380, 7):
        assert abs(sum(clips[start : start + 20]) - 20 * share) <= 1
    for name in ("images", "clips"):
        assert [own for kind, own in kinds if kind == name] == list(range(sum(kind == name for kind, _ in kinds)))
    others = [[KindSchedule(schedule.weights, seed).at(step)[0] for step in range(20)] for seed in range(5)]
    assert len({tuple(kinds) for kinds in others}) > 1
