from __future__ import annotations

import io
import multiprocessing
import os
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sclkern.data import open_pairs
from sclkern.data.batches import Batch
from sclkern.data.dataset import PairDataset, SampleIndex
from sclkern.data.loader import Negatives, PairLoader
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform, denormalize
from sclkern.errors import UserError, WorkerError

TOKENIZER = CaptionTokenizer.from_pretrained("demo")


def colour(number: int, size: tuple[int, int] = (20, 20)) -> bytes:
    """An image of one colour, which gives its number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(images: torch.Tensor) -> list[int]:
    return (denormalize(images)[..., 0, 4, 4] * 255).round().int().tolist()


Make = Callable[..., PairDataset]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A dataset of 30 images with two captions each: pairs 2 i and 2 i + 1 belong to image i."""

    def build(
        images: int = 30,
        replaced: dict[int, bytes] | None = None,
        transform: str = "clip_test",
        **options: Any,
    ) -> PairDataset:
        rows = [
            {
                "image": (replaced or {}).get(i, colour(i)),
                "caption": [f"number {i}", f"the number {i}, a colour"],
            }
            for i in range(images)
        ]
        write_pairs(tmp_path / "t.arrow", rows, batch_rows=7)
        source = open_pairs(tmp_path, ["t"])
        defaults = {"max_text_len": 20, "min_size": 8, "seed": 3}
        return PairDataset(source, TOKENIZER, build_transform(transform, 8), **{**defaults, **options})

    return build


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def demo_dataset(**options: Any) -> PairDataset:
    defaults = {"max_text_len": 50, "min_size": 16, "seed": 0}
    source = open_pairs("demo", ["pairs"], "val")
    return PairDataset(source, TOKENIZER, build_transform("clip_randaug", 32), **{**defaults, **options})


def test_batch_layout(make: Make) -> None:
    dataset = make()
    loader = PairLoader(dataset, batch_size=8, shuffle=True, seed=0, negatives="dataset")
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader.batches_of_epoch()) == 7
    for batch in batches:
        assert batch.keys() == {
            "image",
            "text_ids",
            "text_mask",
            "text_tokens",
            "pair",
            "image_id",
            "undecodable",
            "false_image",
        }
        assert batch["image"].shape == batch["false_image"].shape == (8, 3, 8, 8)
        assert batch["image"].dtype == batch["false_image"].dtype == torch.float32
        assert batch["text_ids"].dtype == batch["pair"].dtype == torch.int64
        assert batch["pair"].shape == (8,) and batch["undecodable"] == {}
        captions = [dataset.source.caption(pair) for pair in batch["pair"].tolist()]
        ids, mask = TOKENIZER(captions, 20)
        assert torch.equal(batch["text_ids"], ids) and torch.equal(batch["text_mask"], mask)
        assert number_of(batch["image"]) == dataset.source.pair_image[batch["pair"]].tolist()


def test_fixed_length(make: Make) -> None:
    loader = PairLoader(make(), batch_size=8, shuffle=True, seed=0, pad_to_max=True)
    assert {batch["text_ids"].shape for batch in loader.epoch(0)} == {(8, 20)}


NEGATIVES = pytest.mark.parametrize("negatives", [None, "dataset", "in_batch"])


@NEGATIVES
def test_number_of_workers_does_not_matter(negatives: Negatives | None) -> None:
    options: dict[str, Any] = {"batch_size": 16, "shuffle": True, "seed": 5, "negatives": negatives}
    options |= {"rank": 1, "world_size": 2, "accumulation": 2}
    here = PairLoader(demo_dataset(), **options)
    workers = PairLoader(demo_dataset(), **options, num_workers=2)
    assert_equal(list(here.epoch(1)), list(workers.epoch(1)))
    assert_equal(list(islice(here.steps(2), 5)), list(islice(workers.steps(2), 5)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumption_gives_the_same_batches(num_workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 16, "shuffle": True, "seed": 5, "accumulation": 2, "negatives": "dataset"}
    loader = PairLoader(demo_dataset(), **options, num_workers=num_workers)
    whole = list(islice(loader.steps(), 12))  # past the end of an epoch, which is that of step 3
    torch.manual_seed(99)
    assert_equal(whole[4:], list(islice(loader.steps(2), 8)))


def test_resumption_does_not_decode_what_was_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make()
    accessed: list[SampleIndex] = []
    original = PairDataset.__getitem__
    monkeypatch.setattr(PairDataset, "__getitem__", lambda self, index: accessed.append(index) or original(self, index))
    next(PairLoader(dataset, batch_size=20, shuffle=False, seed=0).steps(14))
    assert accessed == [SampleIndex(4, pair) for pair in range(40, 60)]


def test_workers_go_on_from_one_epoch_to_the_next(make: Make) -> None:
    others = {process.pid for process in multiprocessing.active_children()}  # such as compilers of other tests
    loader = PairLoader(make(), batch_size=20, shuffle=True, seed=0, num_workers=1)
    batches = loader.steps()
    workers = set()
    for _ in range(3 * len(loader.batches_of_epoch())):
        next(batches)
        workers.update(process.pid for process in multiprocessing.active_children())
    assert len(workers - others) == 1


def test_samples_depend_on_seed_epoch_and_pair_alone() -> None:
    dataset = demo_dataset()
    index = SampleIndex(3, 11, false_image=True)
    first = dataset[index]
    torch.manual_seed(1)
    for other in ((3, 11), (4, 11), (3, 12)):
        same = torch.equal(first["image"], dataset[SampleIndex(*other)]["image"])
        assert same == (other == (3, 11))
    assert not torch.equal(first["image"], demo_dataset(seed=1)[index]["image"])
    copy = pickle.loads(pickle.dumps(dataset))[index]
    assert torch.equal(first["image"], copy["image"]) and torch.equal(first["false_image"], copy["false_image"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_generators_are_left_alone(make: Make, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    loader = PairLoader(make(transform="clip"), batch_size=8, shuffle=True, seed=0, num_workers=num_workers)
    monkeypatch.setattr(torch, "manual_seed", None if num_workers == 0 else torch.manual_seed)
    before = torch.get_rng_state()
    assert len(list(loader.epoch(0))) == 7
    assert torch.equal(before, torch.get_rng_state())


def test_order_changes_with_seed_and_epoch(make: Make) -> None:
    dataset = make()

    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        loader = PairLoader(dataset, batch_size=60, shuffle=shuffle, seed=seed)
        return next(loader.epoch(epoch))["pair"].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert orders[0] == order(0, 0)
    assert all(sorted(pairs) == list(range(60)) for pairs in orders)
    assert len(set(map(tuple, orders))) == 3
    assert order(0, 0, shuffle=False) == order(1, 5, shuffle=False) == list(range(60))


def test_whole_batches_of_an_epoch_are_dealt_to_ranks(make: Make) -> None:
    dataset = make(images=11)
    for world_size in (1, 2, 3, 5):
        loaders = [
            PairLoader(dataset, batch_size=5, shuffle=False, seed=1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        dealt: dict[int, list[int]] = {}
        for loader in loaders:
            batches = [batch["pair"].tolist() for batch in loader.epoch()]
            dealt |= dict(zip(loader.batches_of_epoch(), batches, strict=True))
        # The last two pairs fill no batch.
        assert dealt == {batch: [*range(5 * batch, 5 * batch + 5)] for batch in range(4)}


@pytest.mark.parametrize("images", [2, 5])
def test_the_negative_is_another_image(make: Make, images: int) -> None:
    dataset = make(images=images)
    drawn = set()
    for epoch in range(40):
        for pair in range(2 * images):
            sample = dataset[SampleIndex(epoch, pair, false_image=True)]
            (false,) = number_of(sample["false_image"][None])
            assert false != pair // 2
            drawn.add((pair // 2, false))
    assert len(drawn) == images * (images - 1)


def test_one_image_has_no_negative(make: Make) -> None:
    with pytest.raises(UserError, match="the data have 1 image"):
        PairLoader(make(images=1), batch_size=2, shuffle=True, seed=0, negatives="dataset")


def test_undecodable_images_are_skipped_and_named(make: Make) -> None:
    dataset = make(replaced={4: b"", 5: colour(5)[:40], 29: b"<html>"})
    for pair in (8, 9, 10, 11):
        sample = dataset[SampleIndex(0, pair)]
        assert sample["pair"] == 12 and sample["caption"] == "number 6" and number_of(sample["image"][None]) == [6]
        assert list(sample["undecodable"]) == ["t.arrow row 4", "t.arrow row 5"][pair // 10 :]
    wrapped = dataset[SampleIndex(0, 59)]
    assert wrapped["pair"] == 0 and wrapped["undecodable"] == {"t.arrow row 29": "it is an HTML page"}

    for num_workers in (0, 2):
        loader = PairLoader(dataset, batch_size=30, shuffle=False, seed=0, num_workers=num_workers)
        first, second = loader.epoch(0)
        assert set(first["undecodable"]) == {"t.arrow row 4", "t.arrow row 5"}
        assert first["pair"][8:12].tolist() == [12] * 4
        assert set(second["undecodable"]) == {"t.arrow row 29"}


@pytest.mark.parametrize("error", [ValueError("broken"), FileNotFoundError("gone")])
def test_images_that_a_source_cannot_read_are_skipped(make: Make, error: Exception) -> None:
    dataset = make(images=3)
    read = dataset.source.image_bytes  # type: ignore[attr-defined]

    def image_bytes(index: int) -> memoryview:
        if index == 1:
            raise error
        return read(index)

    dataset.source.image_bytes = image_bytes  # type: ignore[attr-defined]
    sample = dataset[SampleIndex(0, 2)]
    assert sample["pair"] == 4 and sample["undecodable"] == {"t.arrow row 1": str(error)}


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (20, 7)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_smaller_than_a_patch_are_skipped(make: Make, size: tuple[int, int], num_workers: int) -> None:
    dataset = make(replaced={9: colour(9, size)}, transform="clip")
    options: dict[str, Any] = {"shuffle": False, "seed": 0, "num_workers": num_workers, "negatives": "dataset"}
    batches = list(PairLoader(dataset, batch_size=10, **options).epoch(0))
    reason = f"the image is {size[0]} x {size[1]} pixels, smaller than a patch (8)"
    assert batches[1]["undecodable"] == {"t.arrow row 9": reason}
    assert batches[1]["pair"].tolist() == [*range(10, 18), 20, 20]
    assert all(9 not in number_of(batch["false_image"]) for batch in batches)


def test_undecodable_false_image(make: Make) -> None:
    dataset = make(images=3, replaced={1: b""})
    names = set()
    for epoch in range(20):
        sample = dataset[SampleIndex(epoch, 0, false_image=True)]
        assert number_of(sample["image"][None]) == [0] and number_of(sample["false_image"][None]) == [2]
        names.update(sample["undecodable"])
    assert names == {"t.arrow row 1"}


def one_line(loader: PairLoader) -> str:
    with pytest.raises(UserError) as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_of_workers_stay_one_line(make: Make, num_workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 8, "shuffle": False, "seed": 0, "num_workers": num_workers}
    assert "max_length is 2" in one_line(PairLoader(make(max_text_len=2), **options))


@pytest.mark.parametrize(("images", "counted"), [(3, 3), (150, 100)])
def test_nothing_can_be_decoded(make: Make, images: int, counted: int) -> None:
    dataset = make(images=images, replaced=dict.fromkeys(range(images), b"a\nb"))
    message = one_line(PairLoader(dataset, batch_size=1, shuffle=False, seed=0))
    assert message.startswith(f"{counted} images in a row cannot be decoded, the first is t.arrow row 0 (")


def test_batch_larger_than_the_data(make: Make) -> None:
    with pytest.raises(UserError, match="a batch of 61 pairs is larger than the data, which have 60; make the batch"):
        PairLoader(make(), batch_size=61, shuffle=True, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"rank": 1}, {"rank": -1}, {"world_size": 0}, {"accumulation": 0}]
)
def test_wrong_arguments(make: Make, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected batch_size >= 1, accumulation >= 1 and 0 <= rank < world_size"):
        PairLoader(make(), **{"batch_size": 8, "shuffle": True, "seed": 0, **wrong})


def rows_on_pages_of_their_own(folder: Path, count: int = 40) -> PairDataset:
    """A table of several hundred kilobytes, so that no two images are read together."""
    noise = io.BytesIO()
    Image.effect_noise((120, 120), 90).convert("RGB").save(noise, "BMP")
    write_pairs(folder / "t.arrow", [{"image": noise.getvalue(), "caption": [f"number {i}"]} for i in range(count)])
    source = open_pairs(folder, ["t"])
    return PairDataset(source, TOKENIZER, build_transform("clip_test", 8), max_text_len=20, min_size=8, seed=0)


def test_a_table_that_is_removed_is_read_to_the_end(tmp_path: Path) -> None:
    dataset = rows_on_pages_of_their_own(tmp_path)
    batches = PairLoader(dataset, batch_size=4, shuffle=False, seed=0, num_workers=1).epoch()
    next(batches)
    (tmp_path / "t.arrow").unlink()
    assert [batch["undecodable"] for batch in batches] == 9 * [{}]


def test_a_table_that_is_cut_short_ends_the_run_in_one_line(tmp_path: Path) -> None:
    dataset = rows_on_pages_of_their_own(tmp_path)
    batches = PairLoader(dataset, batch_size=4, shuffle=False, seed=0, num_workers=1).epoch()
    next(batches)
    os.truncate(tmp_path / "t.arrow", 4096)
    with pytest.raises(WorkerError, match=r"was killed by SIGBUS, perhaps because .* a file of the data was cut short"):
        list(batches)
