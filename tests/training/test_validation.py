"""What validation logs, and which checkpoint is the best, for recipes with and without retrieval."""

import json

import pytest
import torch

from sclkern.training.checkpoint import load_checkpoint


def validations(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "val"]


@pytest.mark.parametrize(("recipe", "methods"), [("[itm, mlm]", ()), ("[mlm, itc]", ("itc",)), ("scl", ("itc", "itm"))])
def test_retrieval_uses_the_heads_that_the_recipe_trains(pretraining, tmp_path, recipe, methods):
    run = pretraining(objectives__recipe=recipe, run__max_steps=2, run__val_every=1)
    assert run.run()
    rows = validations(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert {key.partition("_")[0] for key in row if key.endswith("_r1")} - {"chance"} == set(methods)
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    if methods:
        assert best["best"] == max(row["recall_sum"] for row in rows)
    else:
        assert best["best"] == -min(row["total"] for row in rows)
    report = run.results.report().read_text()
    assert ("| ITC |" in report, "| ITM |" in report) == ("itc" in methods, "itm" in methods)


def test_a_model_without_the_heads_of_retrieval_trains(pretraining):
    run = pretraining(objectives__recipe="[mlm]", model__heads="[mlm]", run__max_steps=1)
    assert run.run() and not hasattr(run.model, "text_projection")
    assert "## Attention of words" in run.results.report().read_text()


def test_validation_draws_the_same_masks_every_time(pretraining):
    run = pretraining(run__max_steps=1)
    run.model.eval()
    first = run.evaluation.held_out_losses()
    torch.manual_seed(123)
    assert run.evaluation.held_out_losses() == first
