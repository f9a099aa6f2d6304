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
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# An example that cannot run here says why in a comment before it, which neither GitHub nor the site shows.
EXAMPLE = re.compile(r"(?:^<!-- not run: (.+?) -->\n+)?^```python\n(.*?)^```$", re.M | re.S)
EXAMPLES = [
    pytest.param(code, reason, id=f"{name}-{number}")
    for name, text in {"/README.md": README, **PAGES}.items()
    for number, (reason, code) in enumerate(EXAMPLE.findall(text))
]
# The pages that begin with a start for somebody.
STARTS = re.findall(r"\]\((\w+\.md)\)", PAGES["README.md"].partition("## Start here")[2].partition("\n## ")[0])
COMMANDS = [
    line.partition("#")[0].strip()
    for text in (README, *PAGES.values())
    for language, code in FENCED.findall(text)
    if not language
    for line in code.splitlines()
    if line.startswith("sclkern ")
]


@pytest.mark.parametrize(("code", "reason"), EXAMPLES)
def test_every_example_runs(code, reason, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(code, "example")
    if reason:  # what it imports is there all the same
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(tree, "example", "exec"), {"__name__": "example"})


def test_a_block_of_python_is_marked_as_such():
    """A block of another language, or of none, would not be run."""
    for name, text in PAGES.items():
        for language, code in FENCED.findall(text):
            assert language in ("", "python", "sh", "text", "yaml"), (name, language)
            assert language or not re.search(r"^(import|from) \w", code, re.M), (name, code)


@pytest.mark.parametrize("name", STARTS)
def test_a_page_begins_with_a_start_of_ten_lines(name):
    _, code = FENCED.search(PAGES[name]).groups()
    assert len(code.splitlines()) <= 10


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


def test_every_public_module_is_in_the_reference():
    """``make docs`` shows what docs/api lists."""
    listed = set(
        re.findall(r"^\.\. automodule:: (\S+)$", "".join(map(Path.read_text, (ROOT / "docs/api").glob("*.rst"))), re.M)
    )
    folders = ("data", "integrations", "models", "nn", "objectives", "ops", "reference", "step", "tasks", "weights")
    files = [file for folder in folders for file in (ROOT / "sclkern" / folder).rglob("*.py")]
    public = [
        file.relative_to(ROOT).with_suffix("") for file in files if re.search(r"^__all__ = ", file.read_text(), re.M)
    ]
    names = {".".join(path.parts).removesuffix(".__init__") for path in public} - {"sclkern.tasks.registered"}
    assert len(names) > 10 and names <= listed, names - listed


def test_every_page_is_in_the_list():
    linked = set(re.findall(r"\]\((\w+\.md)\)", PAGES["README.md"]))
    assert linked == set(PAGES) - {"README.md"}
