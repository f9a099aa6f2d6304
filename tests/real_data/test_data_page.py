"""The commands of docs/data.md, run as they are written on look-alikes of COCO and Visual Genome."""

import re
import shlex
from pathlib import Path

import look_alikes
from sclkern.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
COMMANDS = [
    shlex.split(line)[1:]
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
    for line in block.splitlines()
    if not language and line.startswith("sclkern ")
]
# Changes that make the base model small; the tables and the folder are the page's.
SMALL = (
    "model.preset=tiny", "model.vocab_size=2048", "model.mask_id=2047", "model.patch_size=16", "weights.text=null",
    "weights.vision=null", "data.tokenizer=demo", "data.num_workers=0", "run.batch_size=4", "run.accumulation=1",
    "run.max_steps=2", "run.device=cpu", "run.precision=float32", "evaluation.rerank=2",
)  # fmt: skip


def test_the_commands_lead_to_a_pre_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    look_alikes.coco(tmp_path / "downloads" / "coco")
    look_alikes.vg(tmp_path / "downloads" / "vg")
    assert [command[:2] for command in COMMANDS[:3]] == [["data", "convert"], ["data", "convert"], ["data", "check"]]
    for command in COMMANDS:
        changes = SMALL if command[0] == "pretrain" else ()
        status = main([*command, *changes])
        assert status == 0, (command, capsys.readouterr())
    assert (tmp_path / "check.html").exists()
    assert list((tmp_path / "runs" / "pretrain_base").glob("**/*.pt"))
