"""``sclkern plan``: the plan as text and JSON."""

import json

from sclkern.cli import main


def test_a_plan_is_shown_and_printed_as_json(capsys):
    config = ["--config", "pretrain_base", "objectives.itm_negatives=dataset"]
    assert main(["plan", *config]) == 0
    assert "masked_text" in capsys.readouterr().out
    assert main(["plan", "--json", "--caption-tokens", "13", *config]) == 0
    described = json.loads(capsys.readouterr().out)
    assert 0.4 < described["flops_ratio"] <= 0.46
    assert described["flops"] == sum(part["flops"] + part["backward"] for part in described["parts"])
    assert main(["plan", "--caption-tokens", "51", *config]) == 2
    assert "caption_tokens: got 51, expected 3 to max_text_len 50" in capsys.readouterr().err
