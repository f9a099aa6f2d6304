"""The README's code runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest

from sclkern.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_model_in_ten_lines():
    (block,) = (block for block in EXAMPLES if "model = SCLModel(" in block)
    names = {}
    exec(block, names)
    assert set(names["losses"].named()) == {"total", "itm", "mlm", "itc", "mvsc", "mlsc"}
    assert names["fused"].text.shape == (2, 4, 64)


def test_every_example_is_short():
    """``tests/test_docs.py`` runs them."""
    assert len(EXAMPLES) > 2
    assert all(len(block.splitlines()) <= 10 for block in EXAMPLES)


@pytest.mark.parametrize("command", re.findall(r"^sclkern pretrain .*$", README, re.M))
def test_the_commands_are_understood(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parent.parent)
    # The data of the example are not here: that must be the only complaint.
    assert main([*shlex.split(command)[1:], f"run.output_dir={tmp_path / 'run'}"]) == 2
    assert "/data/arrow: no such folder" in capsys.readouterr().err


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
