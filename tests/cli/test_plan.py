"""``sclkern plan``: the plan as text and JSON."""

import json

import pytest

from sclkern.cli import main
from sclkern.tools.ledger import budget as step_budget


def test_a_plan_is_shown_and_printed_as_json(capsys):
    config = ["--config", "pretrain_base", "objectives.itm_negatives=dataset"]
    assert main(["plan", *config]) == 0
    assert "masked_text" in capsys.readouterr().out
    assert main(["plan", "--json", "--caption-tokens", "13", *config]) == 0
    described = json.loads(capsys.readouterr().out)
    assert 0.4 < described["flops_ratio"] <= 0.46
    memory = described["memory"]
    assert memory["total"] == pytest.approx(sum(size for name, size in memory.items() if name not in ("rows", "total")))
    assert 2.0 < memory["moments"] / memory["weights"] + 1e-9 < 2.1 and memory["rows"] == 64
    assert described["flops"] == sum(part["flops"] + part["backward"] for part in described["parts"])
    assert main(["plan", "--caption-tokens", "51", *config]) == 2
    assert "caption_tokens: got 51, expected 3 to max_text_len 50" in capsys.readouterr().err


def test_a_ledger_is_shown_and_compared_with_its_budget(capsys, monkeypatch, tmp_path):
    tiny = ["--config", "demo", "model.preset=tiny", "run.batch_size=4", "--caption-tokens=9"]
    assert main(["plan", "--ledger", "--json", *tiny]) == 0
    assert json.loads(capsys.readouterr().out)["step"]["triton"] > 0
    found = {case: dict(figures) for case, figures in step_budget.read()["cases"].items()}
    monkeypatch.setattr(step_budget, "figures", lambda: found)
    file = tmp_path / "budget.json"
    file.write_text(step_budget.BUDGET.read_text())
    budget = ["--budget", str(file)]
    assert main(["plan", "--ledger", "--update", *budget]) == 0
    found["clips, batch 64"]["torch"] += 1
    capsys.readouterr()
    assert main(["plan", "--ledger", "--check", *budget]) == 1
    assert "FAILED clips, batch 64: torch" in capsys.readouterr().out
    assert main(["plan", "--ledger", "--check", "--json", *budget]) == 1
    assert len(json.loads(capsys.readouterr().out)["failed"]) == 1
    assert main(["plan", "--check"]) == 2
    assert main(["plan", "--ledger", "--check", "--budget", str(tmp_path / "none")]) == 2


def test_what_ranks_exchange_is_shown_and_printed_as_json(capsys):
    tiny = ["plan", "--config", "demo", "model.preset=tiny", "run.batch_size=8", "--gpus", "2,4", "--caption-tokens=9"]
    assert main([*tiny, "--link", "12.5"]) == 0
    assert "DDP, 12.5 GB/s a GPU, 396 TFLOP/s" in capsys.readouterr().out
    assert main([*tiny, "--parallel=fsdp", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["assumed"]["parallel"] == "fsdp" and [s["gpus"] for s in described["scales"]] == [2, 4]
    capsys.readouterr()
    for given, told in {
        ("--gpus=8", "--rate=-1"): "--rate: got -1, expected a positive number",
        ("--gpus=8", "--link=0"): "--link: got 0, expected a positive number",
        ("--link=12.5",): "--link: got 12.5 without --gpus, to which it belongs; add --gpus 8",
        ("--parallel=fsdp",): "--parallel: got fsdp without --gpus",
    }.items():
        assert main(["plan", *given]) == 2
        assert told in capsys.readouterr().err
    for arguments, message in (
        (["--gpus", "two"], "--gpus: got 'two', expected numbers such as 8,64,256"),
        (["--gpus", "2", "--ledger"], "--gpus: got --ledger too"),
        (["--gpus", "512"], "--gpus: got 512, expected at most 8, the pairs of a step"),
    ):
        assert main([*tiny[:5], *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_retrieval_is_planned(capsys):
    command = ["plan", "--config", "pretrain_base", "model.image_size=384"]
    assert main([*command, "--retrieval", "5000x25010:all"]) == 0
    printed = capsys.readouterr().out
    assert "5,000 images x 25,010 texts: 125,050,000 pairs on 1 ranks" in printed and "at 396 TFLOP/s" in printed
    assert main([*command, "--retrieval", "5000x25010", "--rate", "100", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["pairs"] == 256 * 30_010 and planned["seconds"] == pytest.approx(planned["flops"] / 1e14)
    assert main([*command, "--retrieval", "5000x25010:0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 0
    for wrong in ("5000", "5000x", "5000x10:some"):
        assert main([*command, "--retrieval", wrong]) == 2
        assert f"--retrieval: got '{wrong}', expected images x texts" in capsys.readouterr().err
    assert main([*command, "--retrieval", "5x5", "--gpus", "8"]) == 2
    assert "--gpus: got --retrieval too" in capsys.readouterr().err
