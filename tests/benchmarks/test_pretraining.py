"""The pre-training of ``benchmarks/training/pretraining.py``, with the smallest model and few steps on a CPU."""

from __future__ import annotations

import contextlib
import json
import time
from multiprocessing.process import BaseProcess

import matplotlib.image
import pytest
import torch

from benchmarks.training import pretraining, separate_process
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.errors import UserError
from sclkern.training.config import PretrainConfig, RunConfig
from sclkern.training.logs import read_metrics

FEW = ["--preset", "tiny", "--steps", "4", "--exact-steps", "4", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture
def here(monkeypatch):
    """Trainings run in this process, as a new one takes seconds to start; returns the overrides of each."""
    started = []

    def run(overrides, folder, seconds):
        started.append(overrides)
        folder.mkdir()
        with contextlib.suppress(UserError):
            separate_process.train(overrides, str(folder))
        return separate_process.results_in(folder)

    monkeypatch.setattr(pretraining, "run_in_process", run)
    return started


@pytest.fixture
def measure(tmp_path):
    """(*arguments) -> exit code and records by case, in order."""

    def run(*arguments):
        code = pretraining.main([*FEW, "--output", str(tmp_path / "out"), *arguments])
        lines = [line for file in (tmp_path / "out").rglob("*.jsonl") for line in file.read_text().splitlines()]
        return code, {row["case"]: row for row in map(json.loads, lines)}

    return run


def test_each_way_is_recorded_after_both_agreed_and_can_be_drawn(here, measure, tmp_path):
    code, rows = measure()
    assert code == 0
    assert list(rows) == ["training/tiny/exact", "training/tiny/fused", "training/tiny/eager"]
    exact = rows["training/tiny/exact"]
    compared = exact["ways"]["fused"]
    assert compared["agrees"] and compared["steps"] == 4 and 0 < compared["largest_difference"] <= exact["tolerance"]
    assert exact["problems"] == {}
    assert [step for step, _ in exact["curves"]["fused"]] == [1, 2, 3, 4]
    for way, backend in (("fused", "auto"), ("eager", "eager")):
        row = rows[f"training/tiny/{way}"]
        assert (row["steps"], row["batch_size"], row["precision"], row["backend"]) == (4, 8, "bfloat16", backend)
        assert [step for step, _ in row["curve"]] == [1, 2, 3, 4]
        assert row["final_losses"]["total"] == row["curve"][-1][1]
        assert row["pairs_per_second"] > 0 and 0 < row["data_wait_share"] < 1 and row["peak_bytes"] > 1e8
        assert row["ran_on"] == "cpu" and "mfu" not in row and "problem" not in row
    assert pretraining.main(["--output", str(tmp_path / "out"), "--draw", str(tmp_path / "curves.png")]) == 0
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0


def test_both_ways_have_the_same_data_and_the_eager_one_the_published_structure(here, measure):
    measure()
    assert len(here) == 4
    fused, eager = here[2:]
    assert set(fused) < set(eager)
    assert {item for item in eager if item not in fused} == {
        "run.backend=eager", "step.share_encodings=none", "step.pack=False", "step.prune_last_layer=False",
        "step.absorb=never", "step.checkpoint_blocks=False",
    }  # fmt: skip


def test_ways_that_disagree_are_not_timed(here, measure, monkeypatch, capsys):
    monkeypatch.setitem(pretraining.VARIANTS["fused"], "objectives.temperature", 0.031)
    code, rows = measure("--profile")
    assert code == 1 and list(rows) == ["training/tiny/exact"] and len(here) == 2
    compared = rows["training/tiny/exact"]["ways"]["fused"]
    assert not compared["agrees"] and compared["largest_difference"] > 1e-3
    assert "fused: not timed" in capsys.readouterr().out


def test_a_way_that_fails_leaves_the_others_timed(here, measure, capsys):
    code, rows = measure("--ways", "graphs,fused")
    assert code == 1 and list(rows) == ["training/tiny/exact", "training/tiny/fused"]
    exact = rows["training/tiny/exact"]
    assert {way: row["agrees"] for way, row in exact["ways"].items()} == {"graphs": False, "fused": True}
    assert exact["problems"]["graphs"].startswith("UserError: cuda_graphs: needs a GPU")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("graphs: not timed") and "needs a GPU" in last


def test_a_loss_that_is_not_a_number_disagrees():
    right = {"step": 1, **dict.fromkeys(pretraining.LOSSES, 1.0)}
    assert pretraining.largest_difference([right], [right]) == (1, 0.0)
    assert pretraining.largest_difference([right], [{**right, "mlm": None}]) == (1, float("inf"))
    assert pretraining.largest_difference([right], []) == (0, float("inf"))


def test_a_training_cut_off_leaves_its_steps(tmp_path, monkeypatch):
    folder, usual, waited = tmp_path / "run", BaseProcess.join, []

    def join(process, timeout=None):
        if waited:
            return usual(process, timeout)
        waited.append(timeout)
        # As if the seconds had passed then.
        while process.is_alive() and len(read_metrics(folder / "metrics.jsonl")) < 3:
            time.sleep(0.05)

    monkeypatch.setattr(BaseProcess, "join", join)
    options = pretraining.parse([*FEW, "--steps", "100000"])
    given = {**pretraining.common(options, tmp_path / "tokenizer"), "run.log_every": 1}
    rows, outcome = separate_process.run_in_process(pretraining.arguments(given), folder, 7)
    assert waited == [7] and 3 <= len(rows) < 100000
    assert outcome["problem"] == "cut off after 7 s" and outcome["peak_bytes"] > 0


def test_without_time_the_cut_off_is_recorded(measure):
    code, rows = measure("--budget", "0.5")
    assert code == 1 and list(rows) == ["training/tiny/exact"]
    exact = rows["training/tiny/exact"]
    assert exact["ways"]["fused"]["steps"] == 0 and set(exact["problems"]) == {"fused", "eager"}


def test_an_early_job_may_take_what_later_ones_do_not_need(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    clock = pretraining.Clock(500, 3)
    assert [clock.share(), clock.share(), clock.share()] == [380, 440, 500]
    assert pretraining.Clock(90, 3).share() == 30
    assert pretraining.Clock(float("inf"), 3).share() is None


def test_rates_leave_the_warm_up_out_and_weigh_rows_by_their_steps():
    config = PretrainConfig(run=RunConfig(max_steps=40, batch_size=10))
    losses = dict.fromkeys(pretraining.LOSSES, 1.0)
    rows = [
        {"step": step, "step_seconds": seconds, "data_seconds": seconds / 4, "pairs_per_second": 10 / seconds, **losses}
        for step, seconds in ((1, 100.0), (20, 50.0), (30, 1.0), (40, 3.0), (41, 4.0))
    ]
    record = pretraining.summary(rows, {}, config)
    assert record["warm_up"] == 20 and record["data_wait_share"] == 0.25
    assert record["step_seconds"] == 3.0 and record["pairs_per_second_overall"] == pytest.approx(10 * 21 / 44)


@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_the_vocabulary_is_the_models(preset, tmp_path):
    options = pretraining.parse(["--preset", preset])
    given = pretraining.common(options, tmp_path / "tokenizer")
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path / "tokenizer")
    size = 50265 if preset == "base" else 2048
    assert given["model.vocab_size"] == tokenizer.vocab_size == size
    assert given["model.mask_id"] == tokenizer.mask_id == size - 1
    demo = CaptionTokenizer.from_pretrained("demo")
    assert torch.equal(tokenizer(["a red fox"], 20)[0], demo(["a red fox"], 20)[0])


@pytest.mark.parametrize("wrong", [["--ways", "fast"], ["--steps", "0"], ["--batch-size", "-1"]])
def test_wrong_options(wrong):
    with pytest.raises(SystemExit):
        pretraining.parse(wrong)


def test_an_unknown_preset_is_one_line(tmp_path, capsys):
    assert pretraining.main(["--preset", "giant", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.training.pretraining: error: preset: got 'giant'")


def test_nothing_to_draw_is_one_line(tmp_path, capsys):
    assert pretraining.main(["--output", str(tmp_path), "--draw", str(tmp_path / "curves.png")]) == 2
    assert "no records of pre-training" in capsys.readouterr().err
