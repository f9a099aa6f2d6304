"""The import graph of the package: no circle, no arrow that CONTRIBUTING's diagram lacks, no hidden import.

Imports inside functions and under TYPE_CHECKING count, and so do names given to ``importlib.import_module``.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Packages that a user may lack, or that take seconds to load. The kernels need Triton.
OPTIONAL = (
    "apex", "flash_attn", "huggingface_hub", "liger_kernel", "matplotlib", "nvtx", "timm", "torch.utils.tensorboard",
    "trackio", "transformers", "triton", "sclkern.kernels", "wandb",
)  # fmt: skip
# The lazy names of the package, the command that was chosen, and modules whose names are data: a reader of the user's,
# libraries that may be missing, packages that the doctor looks for, what a compiling process is sent.
LOADERS = (
    "sclkern", "sclkern.cli", "sclkern.data.source", "sclkern.libraries._lookup", "sclkern.tools.doctor",
    "sclkern.tools.static.workers", "sclkern.tools.warmup",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    """``target`` as written; ``hidden``: inside a function; ``line`` of the module."""

    module: str
    target: str
    line: int
    hidden: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def sources() -> dict[str, Path]:
    """Every module of the package by its name; ``kernels/`` is ``sclkern.kernels``."""
    modules = {}
    for file in sorted((ROOT / "sclkern").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py")):
        if "kernels" in file.relative_to(ROOT).parts[1:-1]:
            continue  # the link
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name if name.startswith("sclkern") else f"sclkern.{name}"] = file
    return modules


MODULES = sources()


def imports_of(module: str, tree: ast.AST) -> Iterator[Import]:
    """Every import of a module, wherever it stands."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        hidden = id(node) in inside
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno, hidden) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                # ``from sclkern import ops`` imports a module, ``from sclkern.ops import attention`` a name of one.
                name = f"{node.module}.{alias.name}"
                yield Import(module, name if is_module(name) else str(node.module), node.lineno, hidden)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            name = node.args[0]
            target = name.value if isinstance(name, ast.Constant) else ast.unparse(name)
            if isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
                target = str(name.values[0].value).rstrip(".")  # f"sclkern.kernels.{module}"
            yield Import(module, str(target), node.lineno, hidden)


def is_module(name: str) -> bool:
    return name in MODULES or any(known.startswith(f"{name}.") for known in MODULES)


IMPORTS = [one for name, file in MODULES.items() for one in imports_of(name, ast.parse(file.read_text()))]


def diagram() -> dict[str, set[str]]:
    """CONTRIBUTING's diagram: each layer with the layers that it may import."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"^```layers\n(.*?)^```$", text, re.M | re.S)
    assert block, "CONTRIBUTING.md has no ```layers block"
    return {name: set(below.split()) for name, below in re.findall(r"^(\S+) +-> *(.*)$", block[1], re.M)}


BASE = {"errors", "io", "random", "distributed", "profiling", "legacy"}


def layer(module: str) -> str:
    """The layer of a module: its package or file directly below ``sclkern``."""
    first = module.split(".")[1] if "." in module else "sclkern"
    return "base" if first in BASE else first


def arrows() -> dict[tuple[str, str], Import]:
    """(layer, imported layer), with one import that draws the arrow."""
    drawn = {}
    for one in IMPORTS:
        if is_module(one.target) and one.target != "sclkern" and one.module != "sclkern":
            ends = layer(one.module), layer(one.target)
            if ends[0] != ends[1]:
                drawn.setdefault(ends, one)
    return drawn


def test_every_layer_is_in_the_diagram():
    layers = {layer(name) for name in MODULES} - {"sclkern"}
    assert layers == set(diagram())


def test_the_diagram_has_no_circle():
    """Whoever is named in a line stands in a line above it."""
    above: set[str] = set()
    for name, below in diagram().items():
        assert below <= above, f"{name} -> {sorted(below - above)}"
        above.add(name)


def test_every_arrow_is_in_the_diagram():
    allowed = diagram()
    wrong = [str(one) for (start, end), one in arrows().items() if end not in allowed[start]]
    assert wrong == []


def test_every_arrow_of_the_diagram_is_drawn():
    drawn = set(arrows())
    unused = [f"{start} -> {end}" for start, below in diagram().items() for end in below if (start, end) not in drawn]
    assert unused == []


def test_no_circle_of_modules():
    """Not within a layer either. A package's ``__init__`` that exports its modules is not one of them."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for one in IMPORTS:
        if one.target in MODULES and one.target != one.module and one.module != "sclkern":
            graph[one.module].add(one.target)
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for below in sorted(graph[name]):
                visit(below, [*path, name])
            finished.add(name)

    for name in graph:
        visit(name, [])


def test_no_import_is_hidden_in_a_function():
    hidden = [
        str(one) for one in IMPORTS if one.hidden and not one.target.startswith(OPTIONAL) and one.module not in LOADERS
    ]
    assert hidden == []


@pytest.mark.parametrize(
    ("code", "target", "hidden"),
    [
        ("import sclkern.step", "sclkern.step", False),
        ("from sclkern import step", "sclkern.step", False),
        ("from sclkern.step import run_step", "sclkern.step", False),
        ("def f():\n    from sclkern.step import plan", "sclkern.step.plan", True),
        ("if TYPE_CHECKING:\n    from sclkern.step import plan", "sclkern.step.plan", False),
        ("def f():\n    importlib.import_module('sclkern.step')", "sclkern.step", True),
        ("f = lambda: import_module('sclkern.step')", "sclkern.step", True),
        ("def f(name):\n    import_module(f'sclkern.step.{name}')", "sclkern.step", True),
    ],
)
def test_every_form_of_import_counts(code, target, hidden):
    (one,) = imports_of("sclkern.ops", ast.parse(code))
    assert (one.target, one.hidden) == (target, hidden)
