"""How a module calls Hugging Face's attention interface, read from the source of its class."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import NamedTuple

from torch import nn

_TABLE = "ALL_ATTENTION_FUNCTIONS"
_CONFIGURED = "self.config._attn_implementation"


class Call(NamedTuple):
    """How a forward calls its attention function.

    Attributes:
        looked_up: whether it looks the function up by the name in ``self.config``, and uses this name for nothing else.
        mask: whether it passes the mask on that it was given, or none.
        keywords: each keyword of the calls, with the sources of its values.
    """

    looked_up: bool
    mask: bool
    keywords: dict[str, tuple[str, ...]]


@functools.cache
def call_of(cls: type[nn.Module]) -> Call | None:
    """Read how a class calls its attention function.

    Args:
        cls: class of modules.

    Returns:
        What its forward does; None where it does not use the interface, or has no source that can be read.
    """
    forward = _parse(inspect.unwrap(cls.forward))
    if forward is None or _TABLE not in {node.id for node in ast.walk(forward) if isinstance(node, ast.Name)}:
        return None
    assigned = [node for node in ast.walk(forward) if isinstance(node, ast.Assign | ast.AnnAssign)]
    functions = {_target(node) for node in assigned if node.value is not None and _names(node.value, _TABLE)}
    calls = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions
    ]
    keywords: dict[str, list[str]] = {}
    masks = []
    for call in calls:
        for keyword in call.keywords:
            if keyword.arg is not None:
                keywords.setdefault(keyword.arg, []).append(ast.unparse(keyword.value))
        masks += [call.args[4]] if len(call.args) > 4 else []
    masks += [ast.parse(value, mode="eval").body for value in keywords.pop("attention_mask", ())]
    return Call(
        looked_up=bool(calls) and _only_looks_up(cls, forward),
        mask=all(_passes_on(mask, forward, assigned) for mask in masks),
        keywords={name: tuple(values) for name, values in keywords.items()},
    )


def _parse(function: object) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def _names(node: ast.AST, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _only_looks_up(cls: type[nn.Module], forward: ast.FunctionDef) -> bool:
    """Whether the class uses the implementation's name only to look it up, after ``__init__``."""
    for name, method in vars(cls).items():
        other = _parse(inspect.unwrap(method)) if inspect.isfunction(method) else None
        if other is not None and name not in ("forward", "__init__") and "_attn_implementation" in ast.unparse(other):
            return False
    found = 0
    for node in ast.walk(forward):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{_TABLE}.get_interface":
            found += _CONFIGURED in [ast.unparse(argument) for argument in node.args]
        # transformers 5.0: ``if ... != "eager": attention_interface = ALL_ATTENTION_FUNCTIONS[...]``
        elif isinstance(node, ast.If) and ast.unparse(node.test) == f"{_CONFIGURED} != 'eager'":
            body = node.body[0]
            only = len(node.body) == 1 and not node.orelse and isinstance(body, ast.Assign)
            found += 2 * (only and ast.unparse(body).endswith(f"= {_TABLE}[{_CONFIGURED}]"))
    return 0 < found == ast.unparse(forward).count("_attn_implementation")


def _passes_on(mask: ast.expr, forward: ast.FunctionDef, assigned: list[ast.Assign | ast.AnnAssign]) -> bool:
    """Whether an argument of a call is None, or one of the masks that the forward was given."""
    if isinstance(mask, ast.Constant):
        return mask.value is None
    given = {argument.arg for argument in (*forward.args.args, *forward.args.kwonlyargs)}
    name = ast.unparse(mask)
    if any(isinstance(node, ast.AugAssign) and ast.unparse(node.target) == name for node in ast.walk(forward)):
        return False
    choices: list[ast.expr] = []
    # ``attention_mask = encoder_attention_mask if is_cross_attention else attention_mask``
    for value in [node.value for node in assigned if node.value is not None and _target(node) == name]:
        choices += [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
    return all(isinstance(choice, ast.Name) and choice.id in given for choice in choices or [mask])
