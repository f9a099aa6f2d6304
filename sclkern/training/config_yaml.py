"""YAML that is read as it is written.

PyYAML follows YAML 1.1, in which ``no`` is false, ``012`` is ten, ``1:30`` is ninety and ``1e-4`` is text; of two equal
keys it takes the second. Here a word is text, and what two versions of YAML read as different numbers is refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from sclkern.errors import UserError

_WORDS = {"~": None, "null": None, "true": True, "false": False, ".inf": math.inf, "+.inf": math.inf}
_WORDS |= {"-.inf": -math.inf, ".nan": math.nan}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
# 012 is ten in YAML 1.1 and twelve in 1.2; the versions have different prefixes for other bases, too.
_OTHER_BASE = re.compile(r"[-+]?0([0-9_]+|[xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")


class _Loader(yaml.BaseLoader):
    """Gives nodes whose plain scalars are not interpreted; a tag is an error."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise UserError(f"{_line(event)}tag {event.tag!r}: tags are not read; write the value without it")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that ``read_yaml`` would take for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        try:
            style = None if _scalar(data) == data else "'"
        except UserError:
            style = "'"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def read_yaml(text: str) -> Any:
    """Read one YAML document.

    Numbers are decimal (``5``, ``1e-4``), ``true`` and ``false`` are booleans, ``null`` and ``~`` are None; every other
    plain word is text, also ``yes``, ``off``, ``1_000``, ``1:30`` and dates. An alias repeats its anchor's value.

    Args:
        text: the document.

    Returns:
        Plain values, keys always as text; None for an empty document or an empty section.

    Raises:
        UserError: not YAML, a key that stands twice, a key below a section without a value, a number in another base
            or with leading zeros, a merge key (``<<``), a tag, an alias within its own anchor.
    """
    node = _compose(text)
    return None if node is None else _value(node, ())


def read_value(text: str) -> Any:
    """Read the value of an override, which is one line.

    Args:
        text: the YAML of the value.

    Returns:
        The plain value.

    Raises:
        UserError: as ``read_yaml``; no value; or YAML would drop a part of the text, such as a comment.
    """
    node = _compose(text)
    if node is None:
        raise UserError("no value; write null for none, or quotes within quotes (\"''\") for an empty text")
    outside = text[: node.start_mark.index] + text[node.end_mark.index :]
    if outside.strip() or "\n" in text:
        raise UserError(
            f"YAML reads only {text[node.start_mark.index : node.end_mark.index]!r} of it; put text with special "
            "characters in quotes of its own"
        )
    return _value(node, ())


def write_yaml(values: dict[str, Any]) -> str:
    """Write plain values so that ``read_yaml`` gives them back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=2**20)


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"not YAML: {' '.join(str(error).split())}; put text with special characters in quotes"
        ) from error
    finally:
        loader.dispose()


def _value(node: yaml.Node, outer: tuple[yaml.Node, ...]) -> Any:
    """The value of a node; ``outer`` are the nodes it lies in."""
    if any(node is one for one in outer):
        raise UserError(f"{_line(node)}an alias stands within its own anchor; write the value out")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, (*outer, node))
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*outer, node)) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:
        return node.value
    if node.start_mark.line != node.end_mark.line:
        raise UserError(
            f"{_line(node)}{node.value!r} stands in several lines; put it in quotes, or correct the indentation"
        )
    try:
        if node.value:
            return _scalar(node.value)
    except (UserError, ValueError) as error:  # int() refuses thousands of digits
        raise UserError(f"{_line(node)}{error}") from error
    raise UserError(f"{_line(node)}no value; write null for none, or quotes ('') for an empty text")


def _mapping(node: yaml.MappingNode, outer: tuple[yaml.Node, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{_line(key)}a key is a list or a section, expected a name; put text in quotes")
        name = key.value
        if name == "<<" and key.style is None:
            raise UserError(f"{_line(key)}merge keys (<<) are not read; write the keys out")
        if name in lines:
            raise UserError(f"{_line(key)}{name!r} stands here and in line {lines[name]}; keep one of them")
        lines[name] = key.start_mark.line + 1
        empty = isinstance(value, yaml.ScalarNode) and value.style is None and not value.value
        # Of a section, all keys may be commented out; a key without a value is more likely a mistake than a null.
        values[name] = None if empty and len(outer) == 1 else _value(value, outer)
    return values


def _scalar(text: str) -> Any:
    """The value of a plain scalar."""
    if (word := text if text.islower() else _capitals(text)) in _WORDS:
        return _WORDS[word]
    if _OTHER_BASE.fullmatch(text):
        raise UserError(f"{text}: is another number in another version of YAML; write it decimal, or text in quotes")
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _capitals(text: str) -> str:
    """``True`` and ``TRUE`` in lower case; mixed capitals as they are."""
    return text.lower() if text in (text.upper(), text.capitalize(), "." + text[1:].capitalize(), ".NaN") else text


def _line(mark: Any) -> str:
    line: int = mark.start_mark.line + 1
    return f"line {line}: "
