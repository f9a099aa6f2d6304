"""The pages of docs: examples run, commands are understood, messages are in the source, links lead somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from sclkern.cli import parse
from sclkern.cli.config_files import load
from sclkern.tasks.config import FinetuneConfig
from sclkern.training.config import build_as, read_values

ROOT = Path(__file__).parent.parent
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in PAGES.items()
    for number, code in enumerate(code for language, code in FENCED.findall(text) if language == "python")
]
COMMANDS = [
    line.partition("#")[0].strip()
    for text in PAGES.values()
    for language, code in FENCED.findall(text)
    if not language
    for line in code.splitlines()
    if line.startswith("sclkern ")
]


@pytest.mark.parametrize("code", BLOCKS)
def test_every_example_runs(code, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = parse(shlex.split(command)[1:])
    if options.name in ("finetune", "evaluate"):
        build_as(FinetuneConfig, read_values(None, options.overrides))
    elif "overrides" in options:
        load(options.config, options.overrides)


def source_texts() -> list[str]:
    """Every string of the source, with … where an f-string puts values."""
    texts = []
    for file in (ROOT / "sclkern").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append(re.sub("…+", "…", text))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_message_is_in_the_source():
    messages = re.findall(r"^### `(.+)`$", PAGES["troubleshooting.md"], re.M)
    texts = source_texts()
    assert len(messages) > 10
    assert [message for message in messages if not any(message in text for text in texts)] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_linked_file_exists(name):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", PAGES[name]):
        assert (ROOT / "docs" / target).exists(), target


def test_every_page_is_in_the_list():
    linked = set(re.findall(r"\]\((\w+\.md)\)", PAGES["README.md"]))
    assert linked == set(PAGES) - {"README.md"}
