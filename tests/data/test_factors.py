"""The rows of a step are the same for every number of ranks, batch size, accumulation and number of workers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sclkern.data import image_ids, open_pairs
from sclkern.data.batches import Batch
from sclkern.data.dataset import PairDataset, SampleIndex
from sclkern.data.loader import Negatives, PairLoader
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.errors import UserError

GLOBAL_BATCH = 12
# World size, batch size, accumulation.
FACTORS = [(1, 12, 1), (1, 3, 4), (2, 6, 1), (2, 3, 2), (3, 2, 2), (3, 4, 1), (4, 3, 1), (4, 1, 3)]
TOKENIZER = CaptionTokenizer.from_pretrained("demo")
Row = dict[str, Any]


def dataset(folder: Path, images: int) -> PairDataset:
    """Two captions an image; images 1 and 2 cannot be decoded. Crops differ, because half of a picture is dark."""
    for number in range(images):
        picture = Image.new("RGB", (20, 20), (number, 9, 7))
        picture.paste((number, 200, 90), (0, 0, 10, 20))
        picture.save(folder / f"{number}.png")
    content = [b"" if i in (1, 2) else (folder / f"{i}.png").read_bytes() for i in range(images)]
    rows = [{"image": image, "caption": [f"number {i}", f"a {i}"]} for i, image in enumerate(content)]
    write_pairs(folder / "t.arrow", rows)
    return PairDataset(
        open_pairs(folder, ["t"]), TOKENIZER, build_transform("clip", 8), max_text_len=9, min_size=8, seed=3
    )


def rows_of_step(batches: list[Batch], negatives: Negatives | None) -> dict[int, Row]:
    """What each place of a global batch has, whatever the batches are that it came in."""
    rows: dict[int, Row] = {}
    for batch in batches:
        false = iter(batch.get("false_image", ()))
        false_place = iter(batch.get("false_place", torch.tensor([])).tolist())
        for row, place in enumerate(batch["place"].tolist()):
            assert place not in rows
            ids = batch["text_ids"][row][batch["text_mask"][row]].tolist()
            rows[place] = {"pair": int(batch["pair"][row]), "image": batch["image"][row], "text": ids}
            if negatives is None:
                continue
            rows[place]["label"] = int(batch["match_labels"][row])
            if rows[place]["label"]:
                continue
            if negatives == "in_batch":
                rows[place]["false_place"] = next(false_place)
            if "false_image" in batch:
                rows[place]["false_image"] = next(false)
            else:
                assert negatives == "in_batch"
                within = batch["place"].tolist().index(rows[place]["false_place"])
                rows[place]["false_image"] = batch["image"][within]
        assert next(false, None) is next(false_place, None) is None
    return rows


def steps(data: PairDataset, factors: tuple[int, int, int], start: int, count: int, **options: Any) -> list[Any]:
    """The rows of each step, and the names that could not be decoded, over all ranks."""
    world_size, batch_size, accumulation = factors
    streams = [
        list(
            islice(
                PairLoader(
                    data,
                    batch_size=batch_size,
                    shuffle=True,
                    seed=5,
                    rank=rank,
                    world_size=world_size,
                    accumulation=accumulation,
                    **options,
                ).steps(start),
                count * accumulation,
            )
        )
        for rank in range(world_size)
    ]
    for stream in streams:
        assert all(batch["image"].shape == (batch_size, 3, 8, 8) for batch in stream)
    found = []
    for step in range(count):
        own = slice(step * accumulation, (step + 1) * accumulation)
        batches = [batch for stream in streams for batch in stream[own]]
        names = {name for batch in batches for name in batch["undecodable"]}
        found.append((rows_of_step(batches, options.get("negatives")), names))
    return found


def assert_same(first: list[Any], second: list[Any]) -> None:
    for (a, named), (b, also_named) in zip(first, second, strict=True):
        assert a.keys() == b.keys() == set(range(GLOBAL_BATCH)) and named == also_named
        for place in a:
            assert a[place].keys() == b[place].keys()
            for key, value in a[place].items():
                same = torch.equal(value, b[place][key]) if isinstance(value, torch.Tensor) else value == b[place][key]
                assert same, (place, key)


@pytest.mark.parametrize("images", [17, 5])  # 34 pairs: two steps an epoch; 10: a step takes more than an epoch
@pytest.mark.parametrize("negatives", [None, "dataset", "in_batch"])
def test_rows_do_not_depend_on_the_factors(tmp_path: Path, images: int, negatives: Negatives | None) -> None:
    data = dataset(tmp_path, images)
    expected = steps(data, (1, 6, 2), 0, 6, negatives=negatives)
    assert any(names for _, names in expected)
    for factors in FACTORS:
        if factors[0] * factors[1] <= 2 * images:
            assert_same(expected, steps(data, factors, 0, 6, negatives=negatives))
            assert_same(expected[3:], steps(data, factors, 3, 3, negatives=negatives))


def test_rows_do_not_depend_on_workers(tmp_path: Path) -> None:
    data = dataset(tmp_path, 17)
    for negatives in ("dataset", "in_batch"):
        expected = steps(data, (1, 12, 1), 1, 3, negatives=negatives)
        assert_same(expected, steps(data, (2, 3, 2), 1, 3, negatives=negatives, num_workers=2))


def test_half_of_the_rows_get_the_image_of_another_place(tmp_path: Path) -> None:
    data = dataset(tmp_path, 17)
    for rows, _ in steps(data, (2, 3, 2), 0, 6, negatives="in_batch"):
        assert sum(row["label"] for row in rows.values()) == GLOBAL_BATCH // 2
        for place, row in rows.items():
            if not row["label"]:
                assert row["false_place"] != place
                assert torch.equal(row["false_image"], rows[row["false_place"]]["image"])


def test_only_false_images_that_are_needed_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(tmp_path, 17)
    indices: list[SampleIndex] = []
    original = PairDataset.__getitem__
    monkeypatch.setattr(PairDataset, "__getitem__", lambda self, index: indices.append(index) or original(self, index))
    options: dict[str, Any] = {"shuffle": True, "seed": 5}
    batch = next(PairLoader(data, batch_size=12, negatives="dataset", **options).steps())
    assert batch["false_image"].shape == (6, 3, 8, 8)
    assert [not index.false_image for index in indices] == batch["match_labels"].bool().tolist()

    indices.clear()
    batch = next(PairLoader(data, batch_size=12, negatives="in_batch", **options).steps())
    assert "false_image" not in batch and len(indices) == 12

    indices.clear()
    batch = next(PairLoader(data, batch_size=6, world_size=2, rank=1, negatives="in_batch", **options).steps())
    elsewhere = set(batch["false_place"].tolist()) - set(batch["place"].tolist())
    assert len(indices) == 6 + len(elsewhere) > 6


def test_a_batch_without_a_false_image(tmp_path: Path) -> None:
    data = dataset(tmp_path, 17)
    options: dict[str, Any] = {"batch_size": 1, "accumulation": 12, "shuffle": True, "seed": 5}
    for negatives in ("dataset", "in_batch"):
        batches = list(islice(PairLoader(data, negatives=negatives, **options).steps(), 12))
        false = [len(batch.get("false_image", ())) for batch in batches]
        assert false == [1 - int(batch["match_labels"]) for batch in batches]
        assert all(("false_image" in batch) >= (negatives == "dataset") for batch in batches)
        assert all(batch["place"].tolist() == [place] for place, batch in enumerate(batches))


def test_dataset_negatives_are_those_of_the_runs_there_are() -> None:
    # As version 0.1 drew them: sums of pixels, of centre crops, of a step of the demo's first epoch.
    source = open_pairs("demo", ["pairs"], "train")
    data = PairDataset(source, TOKENIZER, build_transform("clip_test", 32), max_text_len=50, min_size=16, seed=0)
    loader = PairLoader(data, batch_size=8, shuffle=True, seed=0, negatives="dataset")
    batch = next(loader.steps(3))
    assert batch["pair"].tolist() == [1318, 1450, 56, 543, 681, 656, 1238, 86]
    sums = [5225.66, 2659.15, 2825.55, 4790.07]
    assert batch["false_image"].sum((1, 2, 3)).tolist() == pytest.approx(sums, rel=1e-3)


def captions_of(folder: Path, of_image: list[int], ids: list[int] | None = None) -> PairDataset:
    """Images of one colour with so many captions each, and the ids of their pictures."""
    rows = []
    for number, captions in enumerate(of_image):
        Image.new("RGB", (20, 20), (number, 9, 7)).save(folder / f"{number}.png")
        captions_here = [f"number {number} {i}" for i in range(captions)]
        rows.append({"image": (folder / f"{number}.png").read_bytes(), "caption": captions_here})
    write_pairs(folder / "t.arrow", rows)
    source = open_pairs(folder, ["t"])
    if ids is not None:
        source.image_ids = np.array(ids)  # type: ignore[attr-defined]
    transform = build_transform("clip_test", 8)
    return PairDataset(source, TOKENIZER, transform, max_text_len=9, min_size=8, seed=3)


def test_batches_say_which_pictures_they_hold(tmp_path: Path) -> None:
    data = captions_of(tmp_path, [2, 1, 3])
    options: dict[str, Any] = {"batch_size": 6, "shuffle": False, "seed": 0}
    assert next(PairLoader(data, **options).steps())["image_id"].tolist() == [0, 0, 1, 2, 2, 2]
    data.source.image_ids = np.array([7, 8, 7])  # type: ignore[attr-defined]
    batch = next(PairLoader(data, **options).steps())
    assert batch["image_id"].tolist() == [7, 7, 8, 7, 7, 7] and batch["image_id"].dtype == torch.int64
    assert image_ids(data.source).tolist() == [7, 8, 7] and image_ids(data.source, [[2], [1]]).tolist() == [[7], [8]]
    assert image_ids(open_pairs(tmp_path, ["t"])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("ids", [None, [4, 4, 5, 5, 4, 6]])
@pytest.mark.parametrize("negatives", ["dataset", "in_batch"])
def test_a_false_image_is_never_of_the_same_picture(
    tmp_path: Path, negatives: Negatives, ids: list[int] | None
) -> None:
    data = captions_of(tmp_path, [4, 3, 2, 5, 1, 3], ids)
    pictures = image_ids(data.source)
    of_colour = {round(float(data.transform(data.source.image(i))[0, 4, 4]), 4): i for i in range(6)}
    assert len(of_colour) == 6
    expected = steps(data, (1, 12, 1), 0, 30, negatives=negatives)
    for rows, _ in expected:
        for place, row in rows.items():
            if not row["label"]:
                false = of_colour[round(float(row["false_image"][0, 4, 4]), 4)]
                assert pictures[false] != pictures[data.source.pair_image[row["pair"]]], place
    assert_same(expected, steps(data, (2, 3, 2), 0, 30, negatives=negatives))


def test_a_global_batch_of_one_picture_takes_another_of_the_data(tmp_path: Path) -> None:
    data = captions_of(tmp_path, [12, 3, 4], [1, 1, 0])
    loaders = [
        PairLoader(data, batch_size=4, world_size=3, rank=rank, shuffle=False, seed=5, negatives="in_batch")
        for rank in range(3)
    ]
    other = data.transform(data.source.image(2))
    for loader in loaders:
        batch = next(loader.steps())
        assert batch["image_id"].tolist() == [1] * 4
        own = batch["place"][batch["match_labels"] == 0]
        assert batch["false_place"].tolist() == (own + GLOBAL_BATCH).tolist()
        assert len(batch["false_image"]) == 2 and all(torch.equal(image, other) for image in batch["false_image"])


@pytest.mark.parametrize("negatives", ["dataset", "in_batch"])
@pytest.mark.parametrize(
    ("of_image", "ids", "images"), [([6], None, "1 image"), ([3, 3], [2, 2], "2 images of one picture")]
)
def test_data_of_one_picture_have_no_false_image(
    tmp_path: Path, negatives: Negatives, of_image: list[int], ids: list[int] | None, images: str
) -> None:
    data = captions_of(tmp_path, of_image, ids)
    options: dict[str, Any] = {"batch_size": 2, "shuffle": True, "seed": 0}
    with pytest.raises(UserError, match=f"the data have {images}, expected 2 pictures"):
        PairLoader(data, negatives=negatives, **options)
    PairLoader(data, **options)
