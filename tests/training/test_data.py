"""The data of a run, as its configuration names them."""

import re

import pytest
import torch

from sclkern.errors import UserError
from sclkern.training.config import load_config
from sclkern.training.data import _check_same, caption_widths, open_data
from sclkern.training.passes import copied

CPU = torch.device("cpu")


def test_a_gpu_gets_few_sizes_and_a_cpu_exact_ones(arguments):
    config = load_config(None, arguments())
    for name in ("train_loader", "val_loader"):
        assert getattr(open_data(config, CPU), name).buckets is None
        assert getattr(open_data(config, torch.device("cuda")), name).buckets.widths[-1] == config.model.max_text_len


def test_the_widths_of_a_run_are_those_of_its_buckets(arguments):
    config = load_config(None, arguments())
    data = open_data(config, torch.device("cuda"))
    expected = {*data.train_loader.buckets.widths, *data.val_loader.buckets.widths}
    assert caption_widths(config) == tuple(sorted(expected)) != (16, 24, config.model.max_text_len)
    longest = config.model.max_text_len
    assert caption_widths(load_config(None, arguments(objectives__mlm_mask="published"))) == (longest,)
    # Another machine may compile what this one has no data for.
    elsewhere = load_config(None, arguments(data__root="/nowhere"))
    assert caption_widths(elsewhere) == tuple(sorted({16, min(24, longest), longest}))


def test_training_is_shuffled_and_augmented_and_validation_is_not(arguments):
    data = open_data(load_config(None, arguments()), CPU)
    assert data.train_loader.shuffle and not data.val_loader.shuffle
    assert data.val_loader.dataset.transform is data.val_transform is not data.train_loader.dataset.transform
    assert (data.train_source.num_images, data.val_source.num_images) == (1015, 119)
    assert 900 < len(data.caption_lengths) <= 2000 and min(data.caption_lengths) >= 3


def test_where_images_are_normalised_changes_no_bit(arguments):
    batches = {}
    for normalize in ("device", "host"):
        data = open_data(load_config(None, arguments(data__normalize=normalize)), CPU)
        batches[normalize] = next(data.train_loader.steps()), next(data.val_loader.epoch())
    for device, host in zip(*batches.values(), strict=True):
        assert device["image"].dtype == torch.uint8 and host["image"].dtype == torch.float32
        assert torch.equal(copied(device, CPU, None)["image"], host["image"])


@pytest.mark.parametrize(("mask", "padded"), [("at_least_one", False), ("published", True)])
def test_the_published_masks_need_padded_captions(arguments, mask, padded):
    data = open_data(load_config(None, arguments(objectives__mlm_mask=mask)), CPU)
    assert data.train_loader.pad_to_max is data.val_loader.pad_to_max is padded


def test_a_small_held_out_set_makes_a_smaller_batch(arguments):
    data = open_data(load_config(None, arguments(run__batch_size=500)), CPU)
    assert (data.train_loader.batch_size, data.val_loader.batch_size) == (500, data.val_source.num_pairs)


WHOLE = {"run__batch_size": 600, "run__accumulation": 2, "run__contrastive_batch": 2400}


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (
            1,
            {"run__batch_size": 9999},
            "run.batch_size: got 9999, expected at most the 1993 pairs of the training data",
        ),
        (3, {"run__batch_size": 700}, "run.batch_size: got 700 on 3 processes, 2100 pairs together, expected at most"),
        (2, WHOLE, "run.contrastive_batch: got 2400, expected at most the 1993 pairs"),
        (2, {"run__batch_size": 1}, "expected 2 or more, because a negative image is another row's"),
    ],
)
def test_a_batch_that_does_not_fit_the_data(arguments, world_size, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_data(load_config(None, arguments(**changes)), CPU, world_size=world_size)


def test_ranks_read_the_same_steps(arguments):
    config = load_config(None, arguments(run__accumulation=3, objectives__itm_negatives="hard"))
    loaders = [open_data(config, CPU, rank=rank, world_size=2).train_loader for rank in range(2)]
    assert [loader.global_batch for loader in loaders] == [48, 48] and loaders[0].negatives is None
    assert loaders[0].order.steps_per_epoch == 1993 // 48
    assert [next(loader.steps())["place"].tolist() for loader in loaders] == [[*range(8)], [*range(8, 16)]]


def test_machines_with_other_data_are_told_apart():
    same = {"training data": {"pairs": 3}, "held-out data": {"pairs": 2}, "tokenizer": "x"}
    _check_same({0: same, 1: dict(same)})
    with pytest.raises(UserError, match="rank 2 has another training data and tokenizer than rank 0"):
        _check_same({0: same, 1: same, 2: {**same, "training data": {"pairs": 4}, "tokenizer": "y"}})


def test_the_format_is_named_by_the_configuration(arguments):
    assert open_data(load_config(None, arguments(data__format="arrow")), CPU).train_source.num_images == 1015
    with pytest.raises(UserError, match=r"data\.format: got 'parquet', expected one of auto, "):
        open_data(load_config(None, arguments(data__format="parquet")), CPU)
