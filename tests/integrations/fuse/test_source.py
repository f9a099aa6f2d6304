"""Digests of source, and the table of those that were examined."""

import functools
import importlib.util
import json
import sys

import pytest

from sclkern.integrations import source
from sclkern.integrations.fuse import known
from sclkern.integrations.source import Source, source_digest

TEXT = '''
import math
from torch import nn

LIMIT = 5


def scale(x):
    """Divide."""
    return x / math.sqrt(x.shape[-1])


class Attention(nn.Module):
    """A comment for readers."""

    heads: int = 2

    def forward(self, x: "Tensor") -> "Tensor":
        return scale(self.query(x))  # a comment
'''
DIGEST = Source(TEXT).digest("Attention")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    heads: int = 2\n", "    heads: int = 2\n    kept: bool\n"),
        ('"""Divide."""', '"""Divide by the root."""'),
        ("  # a comment", ""),
        ('x: "Tensor") -> "Tensor"', "x)"),
        ("class Attention", "@auto_docstring\nclass Attention"),
        ("class Attention", "class BertAttention"),
        ("LIMIT = 5", "LIMIT = 6"),
    ],
)
def test_what_changes_no_result_changes_no_digest(old, new):
    assert old in TEXT
    assert Source(TEXT.replace(old, new)).digest("BertAttention" if "BertAttention" in new else "Attention") == DIGEST


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return scale(self.query(x))", "return self.query(x)"),
        ("x / math.sqrt(x.shape[-1])", "x / x.shape[-1] ** 0.5"),
        ("import math", "import numpy as math"),
        ("heads: int = 2", "heads: int = 3"),
        ("    def forward", "    @torch.no_grad()\n    def forward"),
        ("    def forward", "    def __call__(self, x):\n        return x\n\n    def forward"),
        ("def scale(x)", "def scale(x, *rest)"),
    ],
)
def test_what_may_change_a_result_changes_the_digest(old, new):
    assert old in TEXT
    assert Source(TEXT.replace(old, new)).digest("Attention") not in (DIGEST, None)


def test_a_base_class_of_another_file_has_no_digest():
    text = TEXT.replace("nn.Module", "Base").replace("import math", "import math\nfrom a import Base")
    assert Source(text).digest("Attention") is None


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module whose file is ``TEXT``."""
    file = tmp_path / "examined.py"
    file.write_text(TEXT)
    spec = importlib.util.spec_from_file_location("examined", file)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "examined", loaded)
    spec.loader.exec_module(loaded)
    return loaded


def test_a_class_that_runs_as_its_file_says(module):
    assert source_digest(module.Attention) == DIGEST
    assert source_digest(module.scale) == Source(TEXT).digest("scale")


@pytest.mark.parametrize("what", ["method", "function", "class", "file"])
def test_what_was_replaced_has_no_digest(what, module):
    attention = module.Attention
    if what == "method":
        attention.forward = lambda self, x: x
    elif what == "function":
        module.scale = lambda x: x
    elif what == "class":
        module.Attention = type("Attention", (attention,), {"__module__": "examined"})
    else:
        # Changed after it was imported: what runs is not known.
        with open(module.__file__, "w") as file:
            file.write(TEXT.replace("return scale(self.query(x))", "return self.query(x)"))
        source._read.cache_clear()
    assert source_digest(attention) is None


def test_things_without_source_have_no_digest():
    local = type("Local", (), {})
    assert source_digest(local) is source_digest(len) is source_digest(lambda x: x) is source_digest(3) is None


def test_the_table_has_what_is_installed():
    pytest.importorskip("transformers")
    table = json.loads(source.KNOWN_FILE.read_text())
    found = list(known.find(table, known.installed()))
    versions = [entry["versions"][0] for entry in table["compared"].values()]
    compared = min((version for version in versions if not version.startswith("timm")), key=known._order)
    lacking = [
        entry
        for entry in found
        if entry.digest not in table.get(entry.section, ())
        # Classes of older versions were not compared by the matrix of models; tests/integrations runs with the oldest.
        and (entry.section in known.FUNCTIONS or known._order(entry.version) >= known._order(compared))
    ]
    assert found and not lacking, "run python -m sclkern.integrations.fuse.known, see CONTRIBUTING.md"


def test_the_table_has_what_is_installed_of_timm():
    pytest.importorskip("timm")
    table = json.loads(source.KNOWN_FILE.read_text())
    found = list(known.find(table, known.installed("timm"), "timm"))
    lacking = [entry for entry in found if entry.digest not in table[entry.section]]
    assert {entry.section for entry in found} >= {"compared", "forwards", "norms"}
    assert not lacking, "run python -m sclkern.integrations.fuse.known, see CONTRIBUTING.md"


def test_a_forward_that_somebody_else_has_put_there_has_no_digest(module):
    attention = module.Attention
    digest = source.forward_digest(attention)
    assert digest == source.forward_digest(type("Sub", (attention,), {}))
    attention.forward = lambda self, x: x
    assert digest is not None and source.forward_digest(attention) is None


def test_a_decorated_forward_has_a_digest_unless_somebody_else_decorates_it(monkeypatch):
    cls = pytest.importorskip("transformers.models.bert.modeling_bert").BertForMaskedLM
    own = cls.forward
    assert own.__wrapped__ and source.forward_digest(cls) in source.known("forwards")
    monkeypatch.setattr(cls, "forward", functools.wraps(own)(lambda *args, **options: own(*args, **options)))
    assert source.forward_digest(cls) is None


def test_the_command_finds_a_forward_wherever_it_stands(tmp_path, monkeypatch, capsys):
    file = tmp_path / "known.json"
    digest = source.Source(TEXT).forward_digest("Attention")
    file.write_text(json.dumps({"forwards": {digest: {"form": "attention", "names": [], "versions": []}}}))
    monkeypatch.setattr(known, "KNOWN_FILE", file)
    folder = tmp_path / "timm" / "layers"
    folder.mkdir(parents=True)
    (folder / "own.py").write_text("# norm\n" + TEXT)
    (tmp_path / "timm" / "version.py").write_text("__version__ = '1.0.31'\n")
    name = "timm.layers.own:Attention"
    assert known.main(["--update", "--timm", str(tmp_path / "timm")]) == 0
    entry = {"form": "attention", "names": [name], "versions": ["timm 1.0.31", "timm 1.0.31"]}
    assert json.loads(file.read_text()) == {"forwards": {digest: entry}}
    (folder / "own.py").write_text("# norm\n" + TEXT.replace("scale(self.query(x))", "self.query(x)"))
    assert known.main(["--update", "--timm", str(tmp_path / "timm")]) == 1
    # Somebody must read it.
    assert name in capsys.readouterr().out and json.loads(file.read_text()) == {"forwards": {digest: entry}}


def test_the_command_writes_a_new_version(tmp_path, monkeypatch, capsys):
    file = tmp_path / "known.json"
    file.write_text("{}")
    monkeypatch.setattr(known, "KNOWN_FILE", file)
    for number, text in (("5.1.0", TEXT), ("5.2.0", TEXT), ("5.10.0", TEXT.replace("LIMIT", "OTHER") + "unused = 1\n")):
        folder = tmp_path / number / "models" / "bert"
        folder.mkdir(parents=True)
        (folder / "modeling_bert.py").write_text(text)
        (tmp_path / number / "__init__.py").write_text(f'__version__ = "{number}"\n')
    name = "transformers.models.bert.modeling_bert:Attention"
    assert known.main(["--add", "attention", name, "--transformers", str(tmp_path / "5.2.0")]) == 1
    assert known.main(["--update", "--transformers", str(tmp_path / "5.10.0"), str(tmp_path / "5.1.0")]) == 0
    assert json.loads(file.read_text()) == {
        "attention": {DIGEST: {"names": [name], "versions": ["5.1.0", "5.10.0"]}},
    }
    (tmp_path / "5.10.0" / "models" / "bert" / "modeling_bert.py").write_text(TEXT.replace("x / math", "2 * x / math"))
    capsys.readouterr()
    assert known.main(["--transformers", str(tmp_path / "5.10.0")]) == 1
    assert name in capsys.readouterr().out
