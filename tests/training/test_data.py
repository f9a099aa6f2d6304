"""The data of a run, as its configuration names them."""

import pytest
import torch

from sclkern.errors import UserError
from sclkern.training.config import load_config
from sclkern.training.data import open_data

CPU = torch.device("cpu")


def test_a_gpu_gets_few_sizes_and_a_cpu_exact_ones(arguments):
    config = load_config(None, arguments())
    for name in ("train_loader", "val_loader"):
        assert getattr(open_data(config, CPU), name).buckets is None
        assert getattr(open_data(config, torch.device("cuda")), name).buckets.widths[-1] == config.model.max_text_len


def test_training_is_shuffled_and_augmented_and_validation_is_not(arguments):
    data = open_data(load_config(None, arguments()), CPU)
    assert data.train_loader.shuffle and not data.val_loader.shuffle
    assert data.val_loader.dataset.transform is data.val_transform is not data.train_loader.dataset.transform
    assert (data.train_source.num_images, data.val_source.num_images) == (1015, 119)
    assert 900 < len(data.caption_lengths) <= 2000 and min(data.caption_lengths) >= 3


@pytest.mark.parametrize(("mask", "padded"), [("at_least_one", False), ("published", True)])
def test_the_published_masks_need_padded_captions(arguments, mask, padded):
    data = open_data(load_config(None, arguments(objectives__mlm_mask=mask)), CPU)
    assert data.train_loader.pad_to_max is data.val_loader.pad_to_max is padded


def test_a_small_held_out_set_makes_a_smaller_batch(arguments):
    data = open_data(load_config(None, arguments(run__batch_size=500)), CPU)
    assert (data.train_loader.batch_size, data.val_loader.batch_size) == (500, data.val_source.num_pairs)


def test_the_format_is_named_by_the_configuration(arguments):
    assert open_data(load_config(None, arguments(data__format="arrow")), CPU).train_source.num_images == 1015
    with pytest.raises(UserError, match=r"data\.format: got 'parquet', expected one of auto, arrow"):
        open_data(load_config(None, arguments(data__format="parquet")), CPU)
