"""Runs over several sources, and runs whose steps have images or clips."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_run import CLIPS, mixed

from sclkern.data.sources.arrow import write_pairs
from sclkern.errors import UserError
from sclkern.training.config import load_config, resume_difference
from sclkern.training.data import open_data
from sclkern.training.pretraining import Pretraining
from tiny_run import rows

CPU = torch.device("cpu")


def test_sources_are_checked_by_their_keys(tmp_path: Path) -> None:
    config = load_config(None, mixed(tmp_path))
    assert config.data.sources is not None and [source.weight for source in config.data.sources] == [2, 1, 1]
    saved = config.to_dict()
    assert resume_difference(saved, load_config(None, mixed(tmp_path)).to_dict()) is None
    shorter = load_config(None, mixed(tmp_path, weights=(2, 1))).to_dict()
    shorter["data"]["sources"] = shorter["data"]["sources"][:2]
    assert "data.sources was [" in str(resume_difference(saved, shorter))
    other = load_config(None, mixed(tmp_path, weights=(2, 3, 1))).to_dict()
    assert resume_difference(saved, other) == "data.sources.1.weight was 1.0 and is now 3.0"
    reformatted = load_config(None, mixed(tmp_path)).to_dict()
    reformatted["data"]["sources"][0]["format"] = "arrow"
    assert resume_difference(saved, reformatted) is None


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{tables: [a], weights: 2}]", "unknown key 'data.sources.0.weights'; did you mean 'data.sources.0.weight'"),
        ("[{tables: [a], weight: 2}, {tables: [b]}]", "sources: got a weight for 1 of 2, expected one for each"),
        ("[{tables: [a], weight: 0}]", "weight: got 0.0, expected a number above 0"),
        ("[]", "sources: got none, expected a list of sources"),
        ("[{root: x}]", "data.sources.0.tables"),
        ("[{tables: []}]", "tables: got none"),
        ("[a]", "data.sources.0: got 'a', expected a source with keys, such as {tables: [train]}"),
        ("[{tables: [a], weight: 1.0e+308}, {tables: [b], weight: 1.0e+308}]", "got weights whose sum is inf"),
    ],
)
def test_wrong_sources_are_refused(sources: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(None, [f"data.sources={sources}"])
    assert message in str(raised.value)


def test_a_source_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    changes = {"data__sources": '[{"tables": ["a"]}, {"root": "gone", "tables": ["b"]}]'}
    with pytest.raises(UserError, match=r"data.sources.1: .*gone.*correct data.sources.1.root$"):
        open_data(load_config(None, mixed(tmp_path, **changes)), CPU)


@pytest.mark.parametrize(
    ("sources", "key"),
    [
        ([{"tables": ["a", "a"]}], "0.tables: got 'a', which it reads as 'a' too"),
        ([{"tables": ["a"]}, {"tables": ["{b,a}"]}], "1.tables: got 'a', which data.sources.0 reads as 'a' too"),
        ([{"tables": ["[ab]"]}, {"tables": ["b"]}], "1.tables: got 'b', which data.sources.0 reads as '[ab]' too"),
        ([{"tables": ["b"]}, {"tables": ["*"]}], "1.tables: got '*', which data.sources.0 reads as 'b' too"),
    ],
)
def test_a_table_is_read_once(tmp_path: Path, sources: list[dict[str, Any]], key: str) -> None:
    arguments = mixed(tmp_path, data__sources=json.dumps(sources))
    with pytest.raises(UserError, match=rf"^data.sources.{re.escape(key)}, expected each table once"):
        open_data(load_config(None, arguments), CPU)


def test_a_table_of_two_folders_or_two_splits_is_no_table_read_twice(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_pairs(tmp_path / "other" / "a.arrow", rows(9))
    write_pairs(tmp_path / "c.arrow", [*rows(5), *rows(4, "restval")])
    sources = [{"tables": ["a"]}, {"tables": ["a"], "root": f"{tmp_path}/other"}]
    sources += [{"tables": ["c"], "split": split} for split in ("train", "restval")]
    data = open_data(load_config(None, mixed(tmp_path, data__sources=json.dumps(sources))), CPU)
    assert data.train_source.num_pairs == 40 + 9 + 9


def test_a_batch_above_the_clips_is_refused_by_their_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.batch_size: got 25, .* at most the 24 clip-caption pairs"):
        open_data(load_config(None, mixed(tmp_path, run__batch_size=25)), CPU)


def test_a_source_too_small_for_its_weight_is_refused(tmp_path: Path) -> None:
    config = load_config(None, mixed(tmp_path, weights=(1, 99, 1), run__batch_size=38))
    with pytest.raises(UserError, match="got weight 99 for a source of 30 pairs, of which a contrast would see 38"):
        open_data(config, CPU)


def test_clips_need_a_model_with_frames(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.num_frames: got 3, expected 1 to model.max_frames 2"):
        open_data(load_config(None, mixed(tmp_path, model__max_frames=2)), CPU)


def test_what_sources_replace_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_data(load_config(None, mixed(tmp_path, data__train_split="null", data__val_tables="[b]")), CPU)
    keys = [record.getMessage().split()[0] for record in caplog.records if "is not read" in record.getMessage()]
    assert keys == ["data.train_split", "data.val_tables", "data.val_split"]


def test_a_source_without_a_format_has_that_of_the_data(tmp_path: Path) -> None:
    sources = json.dumps([{"tables": ["5"]}])
    changes = {"data__sources": sources, "data__val_sources": sources, "data__format": CLIPS["format"]}
    data = open_data(load_config(None, mixed(tmp_path, run__batch_size=2, **changes)), CPU)
    assert list(data.train_sources) == ["clips"] and data.train_source.num_pairs == 5


def batches(arguments: list[str], steps: int, start: int = 0, **world: int) -> list[dict[str, Any]]:
    config = load_config(None, arguments)
    stream = open_data(config, CPU, **world).train_loader.steps(start)
    return [next(stream) for _ in range(steps * config.run.accumulation)]


@pytest.mark.parametrize("weights", [(2, 1, 1), None])
def test_a_step_has_images_or_clips_whatever_the_factors_and_the_start(
    tmp_path: Path, weights: tuple[float, ...] | None
) -> None:
    whole = batches(mixed(tmp_path, weights=weights), 12)
    shapes = {tuple(batch["image"].shape[1:]) for batch in whole}
    assert shapes == {(3, 32, 32), (3, 3, 32, 32)}
    clips = sum(batch["image"].ndim == 5 for batch in whole)
    assert clips == pytest.approx(12 / 4 if weights else 12 * 24 / 94, abs=1)
    parts = batches(mixed(tmp_path, weights=weights, run__batch_size=4, run__accumulation=2), 12)
    ranks = [
        batches(mixed(tmp_path, weights=weights, run__batch_size=4), 12, rank=rank, world_size=2) for rank in range(2)
    ]
    workers = batches(mixed(tmp_path, weights=weights, data__num_workers=2), 3, start=9)
    for step, batch in enumerate(whole):
        for first, second in (parts[2 * step : 2 * step + 2], (ranks[0][step], ranks[1][step])):
            for name in ("image", "pair", "match_labels"):
                assert torch.equal(batch[name], torch.cat([first[name], second[name]]))
        if step >= 9:
            assert torch.equal(batch["image"], workers[step - 9]["image"])


def test_frames_of_a_clip_are_augmented_alike_and_follow_one_another(tmp_path: Path) -> None:
    clip = next(batch for batch in batches(mixed(tmp_path), 12) if batch["image"].ndim == 5)
    green = clip["image"][:, :, 1].flatten(2).float().mean(2)
    assert (green.diff(dim=1) >= 0).all() and (green[:, -1] > green[:, 0]).all()


def test_a_mixed_run_trains_validates_and_goes_on_to_the_same_weights(tmp_path: Path, one_thread: None) -> None:
    def run(name: str, *, resume: bool = False, **changes: Any) -> Pretraining:
        changes = {"run__val_every": 3, "run__max_steps": 6, "evaluation__attention_images": 0, **changes}
        arguments = mixed(tmp_path, run__output_dir=tmp_path / name, **changes)
        training = Pretraining(load_config(None, arguments), resume=resume)
        training.run()
        return training

    whole = run("whole")
    run("parts", run__stop_at=3)
    parts = run("parts", resume=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    described = whole.evaluation.describe()
    assert "75 % of the steps images, 25 % of the steps clips, 40 images and 10 clips held out" in described
    values = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in values if row["kind"] == "val"]
    assert held_out and {"images_total", "clips_total", "images_itc", "clips_itc", "total"} <= set(held_out[0])
    report = whole.results.report().read_text()
    assert "| held-out, 40 images" in report and "| held-out clips, 10 images" in report


def test_a_run_of_clips_alone(tmp_path: Path) -> None:
    clips = [{**CLIPS, "tables": ["24"]}]
    changes = {"data__sources": json.dumps(clips), "data__val_sources": json.dumps(clips), "run__max_steps": 2}
    training = Pretraining(load_config(None, mixed(tmp_path, **changes)))
    assert training.run()
    frames = []
    source, choose = training.data.val_source, training.data.val_source.frames
    source.frames = lambda clip, wanted: frames.append(wanted(9)) or choose(clip, wanted)
    assert "| held-out, 24 images" in training.results.report().read_text()
    assert {tuple(chosen) for chosen in frames} == {(0, 4, 8)}
