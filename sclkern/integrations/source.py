"""Digests of source: whether a class or a function of somebody else is one that was examined before.

A digest covers the definition, all that it names in its own file, and where its other names come from. It leaves out
comments, docstrings, annotations, the definition's own name, and decorators that only document. It is the same in every
supported version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

KNOWN_FILE = Path(__file__).with_name("fuse") / "known.json"
_DOCUMENTING = ("auto_docstring", "add_start_docstrings", "add_end_docstrings", "replace_return_docstrings")
# Bases of other files whose source changes nothing of what a forward computes.
_BASES = (
    "torch.nn.Module", "torch.nn.modules.module.Module", "torch.nn.LayerNorm",
    "modeling_layers.GradientCheckpointingLayer",
)  # fmt: skip


@functools.cache
def known(section: str) -> dict[str, Any]:
    """One section of ``known.json``, which ``python -m sclkern.integrations.fuse.known`` writes.

    Args:
        section: a rule of ``fuse``, or another name of a section, such as "attention".

    Returns:
        What the table has for each digest; empty where it lacks the section.
    """
    entries: dict[str, Any] = json.loads(KNOWN_FILE.read_text()).get(section, {})
    return entries


def source_digest(thing: Any) -> str | None:
    """The digest of a class or function as it runs now.

    Args:
        thing: a class, or a function at the top of its file (decorated or not).

    Returns:
        16 hexadecimal digits; None where there is no source, where a base class comes from another file, or where a
        method or function was replaced after its file was read.
    """
    thing = inspect.unwrap(thing)
    name, module = getattr(thing, "__qualname__", None), sys.modules.get(getattr(thing, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if not name or not file or not file.endswith(".py") or not os.path.isfile(file):
        return None
    try:
        source = _read(file, os.stat(file).st_mtime_ns)
        digest, used = source.digest(name), source.used_by(name)
    except (OSError, SyntaxError, UnicodeDecodeError, KeyError):
        return None
    if not hasattr(module, name) or inspect.unwrap(getattr(module, name)) is not thing:
        return None
    return digest if all(_runs(source, module, other) for other in used) else None


def forward_digest(cls: Any) -> str | None:
    """The digest of the text of a class's ``forward`` alone: what it does with children, whatever they are.

    Args:
        cls: a class of modules.

    Returns:
        16 hexadecimal digits, the same for copies in other files; None where there is no source, or where the forward
        is not that of its file.
    """
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    module = sys.modules.get(owner.__module__)
    forward, file = vars(owner)["forward"], getattr(module, "__file__", None)
    while getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers."):
        # What its own decorators, which the digest covers, put around it; and gradient checkpointing, which
        # modeling_layers puts around the forward of every subclass.
        if not hasattr(forward, "__wrapped__"):
            break
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    if not file or not file.endswith(".py") or not os.path.isfile(file):
        return None
    try:
        source = _read(file, os.stat(file).st_mtime_ns)
        return source.forward_digest(owner.__qualname__) if code in source.codes(owner.__qualname__) else None
    except (OSError, SyntaxError, UnicodeDecodeError, KeyError):
        return None


@functools.lru_cache(maxsize=64)
def _read(file: str, modified: int) -> Source:
    return Source(Path(file).read_text(encoding="utf-8"))


class Source:
    """The definitions at the top of one Python file.

    Args:
        text: the file's text.

    Raises:
        SyntaxError: it is no Python.
    """

    def __init__(self, text: str) -> None:
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, str] = {}
        self._importing: list[ast.stmt] = []
        self._index(ast.parse(text).body)

    def digest(self, name: str) -> str | None:
        """The digest of a definition.

        Args:
            name: of a class or function at the top of the file.

        Returns:
            As ``source_digest``.

        Raises:
            KeyError: the file does not define it.
        """
        used = self.used_by(name)
        parts = []
        # By content, because copies of one class are named after the model that they stand in.
        for other in used:
            for node in self.definitions[other]:
                if isinstance(node, ast.ClassDef) and any(not self._is_known_base(base) for base in node.bases):
                    return None
                parts.append(" ".join(self._words(node, name)))
        parts.sort()
        first = " ".join(" ".join(self._words(node, name)) for node in self.definitions[name])
        return hashlib.sha256("\n".join([first, *parts]).encode()).hexdigest()[:16]

    def forward_digest(self, name: str) -> str | None:
        """The digest of the forward of a class.

        Args:
            name: of a class at the top of the file.

        Returns:
            As ``forward_digest`` of this module; None where the class has not one forward of its own.

        Raises:
            KeyError: the file does not define it.
        """
        bodies = [node.body for node in self.definitions[name] if isinstance(node, ast.ClassDef)]
        forwards = [part for body in bodies for part in body if getattr(part, "name", None) == "forward"]
        if len(forwards) != 1:
            return None
        return hashlib.sha256(" ".join(self._words(forwards[0], "")).encode()).hexdigest()[:16]

    def codes(self, name: str) -> set[CodeType]:
        """The compiled code of a definition and of all functions in it.

        Args:
            name: of a class or function at the top of the file.

        Returns:
            Code objects, equal to those that Python made when it imported this text.
        """
        # With the imports: Python compiles a call of an imported name in another way than that of a method.
        module = ast.Module([*self._importing, *self.definitions[name]], [])
        found, waiting = set(), [compile(module, "<source>", "exec", dont_inherit=True)]
        while waiting:
            inner = [constant for constant in waiting.pop().co_consts if isinstance(constant, CodeType)]
            found.update(inner)
            waiting += inner
        return found

    def used_by(self, name: str) -> list[str]:
        """A definition and, in turn, all definitions of this file that it names.

        Args:
            name: of a class or function at the top of the file.

        Returns:
            Their names, in alphabetical order.

        Raises:
            KeyError: the file does not define it.
        """
        used, waiting = {name}, [name]
        while waiting:
            for node in self.definitions[waiting.pop()]:
                for other in _names(node):
                    if other in self.definitions and other not in used:
                        used.add(other)
                        waiting.append(other)
        return sorted(used)

    def _index(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._importing.append(node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.definitions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            self.definitions.setdefault(part.id, []).append(node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports[alias.asname or alias.name.split(".")[0]] = alias.name
            elif isinstance(node, ast.ImportFrom):
                # Without the number of dots: a copy of a class may stand deeper.
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
            elif isinstance(node, ast.If | ast.Try):
                handlers = [handler.body for handler in getattr(node, "handlers", [])]
                for block in (node.body, node.orelse, *handlers):
                    self._index(block)

    def _is_known_base(self, base: ast.expr) -> bool:
        first, *rest = ast.unparse(base).split(".")
        return first in self.definitions or ".".join([self.imports.get(first, first), *rest]).endswith(_BASES)

    def _words(self, node: Any, own: str) -> Iterator[str]:
        """The node without what changes nothing, as words that are the same in every version of Python."""
        if isinstance(node, ast.Name):
            yield "_" if node.id == own else self.imports.get(node.id, node.id)
        elif isinstance(node, ast.Constant):
            yield f"{type(node.value).__name__}:{node.value!r}"
        elif isinstance(node, ast.AST):
            yield type(node).__name__
            for field, value in _fields(node):
                if field == "name" and value == own:
                    value = "_"
                yield f"{field}("
                for part in value if isinstance(value, list) else [value]:
                    yield from self._words(part, own)
                yield ")"
        else:
            yield repr(node)


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """The fields of a node that say what it does; empty ones differ between versions of Python."""
    for field, value in ast.iter_fields(node):
        if field in ("ctx", "kind", "annotation", "returns", "type_comment", "type_params", "simple"):
            continue
        if field == "decorator_list":
            value = [decorator for decorator in value if not _documents(decorator)]
        elif field == "body" and isinstance(value, list):
            value = [statement for statement in value if not _says_nothing(statement)]
        if value is not None and value != []:
            yield field, value


def _documents(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called).split(".")[-1] in _DOCUMENTING


def _says_nothing(statement: ast.stmt) -> bool:
    """Whether it is a docstring, or an annotation without a value."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is None
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _names(node: Any) -> Iterator[str]:
    """The names that a node uses where it matters."""
    if isinstance(node, ast.Name):
        yield node.id
    for _, value in _fields(node):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _names(part)


def _runs(source: Source, module: Any, name: str) -> bool:
    """Whether the module's definition of this name, and every method of it, is what the file says."""
    current, codes = getattr(module, name, None), source.codes(name)
    for node in source.definitions[name]:
        if isinstance(node, ast.FunctionDef) and _code(current) not in codes:
            return False
        if isinstance(node, ast.ClassDef):
            if not isinstance(current, type):
                return False
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            if any(_code(inspect.getattr_static(current, method, None)) not in codes for method in methods):
                return False
    return True


def _code(function: Any) -> Any:
    for inner in ("__func__", "fget", "func"):
        function = getattr(function, inner, None) or function
    return getattr(inspect.unwrap(function), "__code__", None)
