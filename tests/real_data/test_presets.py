"""The shipped configurations start from converted data sets, and train: here look-alikes, with a small model."""

import json

import pytest
import torch

import look_alikes
from sclkern.cli import main
from sclkern.cli.config_files import load
from sclkern.data.sources.arrow import ArrowPairs
from sclkern.training.data import open_data

# A small model, and data in the folders that docs/data.md writes.
SMALL = [
    "model.preset=tiny", "model.vocab_size=2048", "model.mask_id=2047", "weights.text=null", "weights.vision=null",
    "data.tokenizer=demo", "data.num_workers=0", "run.batch_size=2", "run.accumulation=2", "run.max_steps=10",
    "run.device=cpu", "run.precision=float32", "run.val_every=10", "evaluation.rerank=2",
]  # fmt: skip
TABLES = ["coco_caption_karpathy_train", "coco_caption_karpathy_restval", "vg", "sbu_0", "conceptual_caption_train_0"]
CLIPS = ["model.max_frames=8", "model.patch_mask_token=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets")
    for name in ("coco", "vg", "sbu", "cc3m", "webvid"):
        tree = getattr(look_alikes, name)(folder / "data" / name)
        output = tree.root if name == "webvid" else folder / "data" / "arrow"
        assert main(["data", "convert", name, str(tree.root), "--output", str(output)]) == 0
    return folder


@pytest.mark.parametrize(
    ("preset", "changes", "expected"),
    [
        ("pretrain_base", [], "images with"),
        ("pretrain_full", [], "images with"),
        ("pretrain_video", CLIPS, "8 clips with"),
        ("pretrain_mixed", CLIPS, "66.7 % of the steps images, 33.3 % of the steps clips"),
    ],
)
def test_ten_steps(folder, monkeypatch, capsys, preset, changes, expected):
    monkeypatch.chdir(folder)
    assert main(["pretrain", "--config", preset, *SMALL, *changes]) == 0
    assert expected in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "runs" / preset / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 10
    held_out = [row for row in rows if row["kind"] == "val"]
    assert held_out and ("clips_total" in held_out[-1]) == (preset == "pretrain_mixed")


def test_four_sets_are_read_by_the_patterns_of_their_tables(folder, monkeypatch):
    monkeypatch.chdir(folder)
    source = open_data(load("pretrain_full", SMALL), torch.device("cpu")).train_source
    assert source.num_pairs == sum(len(ArrowPairs(folder / "data" / "arrow", [name]).pair_image) for name in TABLES)
