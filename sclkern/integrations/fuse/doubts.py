"""What the code of a class may depend on and a trial does not show: sizes, variables of its module, random numbers."""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import inspect
import logging
import textwrap
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# Libraries whose functions compute the same in every call, apart from the names below.
_LIBRARIES = (
    "builtins", "collections", "einops", "functools", "itertools", "logging", "math", "numpy", "operator", "torch",
    "transformers", "typing", "warnings", "_operator",
)  # fmt: skip
_STATES = {
    "get_autocast_dtype", "grad_fn", "is_autocast_cpu_enabled", "is_autocast_enabled", "is_compiling",
    "is_contiguous", "is_grad_enabled", "is_inference", "is_inference_mode_enabled", "is_leaf", "requires_grad",
}  # fmt: skip
_RANDOM = {
    "bernoulli", "bernoulli_", "choice", "default_rng", "getrandbits", "multinomial", "normal_", "perf_counter", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "random", "random_", "randperm", "uniform",
    "uniform_",
}  # fmt: skip


def doubt(thing: Any) -> str | None:
    """The reason not to believe a trial of a class or function, or None.

    Args:
        thing: a class of modules, or a function.

    Returns:
        The reason, such as "its code decides by q.shape[0] > 2, of which a trial shows only some cases".
    """
    return _doubt(thing)


@functools.cache
def _doubt(thing: Any) -> str | None:
    reasons = (_doubt_of(function, thing) for function in _functions(thing))
    return next((reason for reason in reasons if reason is not None), None)


def _functions(thing: Any) -> Iterator[FunctionType]:
    """The functions that a class or a function consists of, with those of its own file that they call."""
    waiting: list[Any] = []
    if isinstance(thing, type):
        for base in thing.__mro__:
            if _root(base) not in ("torch", "builtins"):
                for name, value in vars(base).items():
                    function = getattr(value, "__func__", getattr(value, "fget", value))
                    waiting += [function] if name != "__init__" else []
    else:
        waiting.append(thing)
    seen = set()
    while waiting:
        function = waiting.pop()
        # What a decorator has wrapped.
        waiting += [function.__wrapped__] if hasattr(function, "__wrapped__") else []
        if not isinstance(function, FunctionType) or function in seen:
            continue
        # A wrapper has the module of what it wraps.
        if str(function.__globals__.get("__name__")).startswith(("torch.", "transformers.utils.")):
            continue
        seen.add(function)
        yield function
        found = [function.__globals__.get(name) for name in _globals(function.__code__)]
        found += [cell.cell_contents for cell in function.__closure__ or () if not isinstance(cell.cell_contents, type)]
        waiting += [value for value in found if isinstance(value, FunctionType) and _root(value) not in _LIBRARIES]


def _doubt_of(function: FunctionType, thing: Any) -> str | None:
    names = set(_names(function.__code__))
    if found := sorted(names & _STATES):
        return f"its code asks for {found[0]}, of which a trial shows only some cases"
    if found := sorted(names & _RANDOM):
        return f"its code draws random numbers ({found[0]}), or looks as if"
    family = thing.__mro__ if isinstance(thing, type) else ()
    for name in _globals(function.__code__):
        value = function.__globals__.get(name, getattr(builtins, name, None))
        if value not in family and not _is_constant(value):
            return f"its code reads {name}, which lies outside the module and may change"
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        if name != "__class__" and not _is_constant(cell.cell_contents):
            return f"its code reads {name}, which lies outside the module and may change"
    tree = _parse(function)
    if tree is None:
        return "its source cannot be read"
    return next(
        (f"its code decides by {text}, of which a trial shows only some cases" for text in _choices(tree)), None
    )


def _is_constant(value: Any) -> bool:
    """Whether a name of the module around a class stands for code that can be followed, or that is known."""
    if isinstance(value, FunctionType | logging.Logger):
        return True
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0] in _LIBRARIES
    if isinstance(value, type):
        return issubclass(value, nn.Module) or _root(value) in _LIBRARIES
    if isinstance(value, BuiltinFunctionType) or type(value).__module__.startswith(("torch", "typing")):
        return not isinstance(value, nn.Module)
    return type(value).__module__.startswith("transformers.utils.logging")


def _choices(tree: ast.AST) -> Iterator[str]:
    """Tests and comparisons by something else than flags, attributes, and whether an argument is None."""
    assigned: dict[str, list[ast.expr]] = {}
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
        # What only raises an error, or warns, changes no result.
        if isinstance(node, ast.Assert) or (
            isinstance(node, ast.If) and not node.orelse and _only_complains(node.body)
        ):
            harmless.update(ast.walk(node.test))
        if isinstance(node, ast.BoolOp) and _is_plain(node, {}, 0):
            harmless.update(node.values)
    for node in ast.walk(tree):
        tests: list[ast.expr] = []
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            tests = [node.test]
        elif isinstance(node, ast.BoolOp):
            tests = node.values
        elif isinstance(node, ast.Compare):
            tests = [] if _is_mask(node) else [node]
        elif isinstance(node, ast.Match):
            tests = [node.subject]
        elif isinstance(node, ast.Try):
            yield "what raises an error"
        elif isinstance(node, ast.BinOp | ast.Call) and _jumps(node):
            yield ast.unparse(node)
        yield from (ast.unparse(test) for test in tests if test not in harmless and not _is_plain(test, assigned, 4))


def _is_plain(test: ast.expr, assigned: dict[str, list[ast.expr]], depth: int) -> bool:
    """Whether a test is by a flag, an attribute of the module, or the kind of an argument."""
    if isinstance(test, ast.BoolOp):
        # The module itself computes calls with a cache.
        if isinstance(test.op, ast.And) and any(map(_is_cache_given, test.values)):
            return True
        return all(_is_plain(value, assigned, depth) for value in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _is_plain(test.operand, assigned, depth)
    if isinstance(test, ast.Constant):
        return True
    if isinstance(test, ast.Name):
        values = assigned.get(test.id, [])
        return all(depth > 0 and _is_plain(value, assigned, depth - 1) for value in values)
    if isinstance(test, ast.IfExp):
        return all(_is_plain(part, assigned, depth) for part in (test.test, test.body, test.orelse))
    if isinstance(test, ast.Compare):
        if all(isinstance(operator, ast.Is | ast.IsNot) for operator in test.ops):
            return True
        sides = (test.left, *test.comparators)
        dtype = isinstance(test.left, ast.Attribute) and test.left.attr == "dtype"
        return (dtype and ast.unparse(test.comparators[0]) == "torch.bool") or all(map(_is_setting, sides))
    if isinstance(test, ast.Call):
        called = ast.unparse(test.func)
        kind = called in ("isinstance", "hasattr", "callable") or called.endswith(".is_floating_point")
        return kind or _is_setting(test)
    return _is_setting(test)


def _is_cache_given(test: ast.expr) -> bool:
    return ast.unparse(test) in ("cache is not None", "past_key_value is not None", "past_key_values is not None")


def _is_setting(value: ast.expr) -> bool:
    """Whether an expression is a constant, or an attribute of the module, which is compared at each call."""
    if isinstance(value, ast.Constant):
        return True
    if isinstance(value, ast.Tuple | ast.List | ast.Set):
        return all(map(_is_setting, value.elts))
    text = ast.unparse(value)
    if isinstance(value, ast.Call):
        return text.startswith("getattr(self, ") and all(map(_is_setting, value.args[1:]))
    return isinstance(value, ast.Attribute) and text.startswith("self.") and text.count(".") == 1


def _jumps(node: ast.BinOp | ast.Call) -> bool:
    """Whether an expression chooses between sizes without a test: a remainder, the smaller of two."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("min", "max")
    return isinstance(node.op, ast.Mod) and not isinstance(node.left, ast.Constant)


def _is_mask(node: ast.Compare) -> bool:
    """``mask == 0``: which keys are masked, and no choice for the whole."""
    named = isinstance(node.left, ast.Name) and "mask" in node.left.id
    return named and all(isinstance(value, ast.Constant) for value in node.comparators)


def _only_complains(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Expr) and ast.unparse(node).startswith(("logger.", "warnings.warn(")))
        for node in body
    )


def _parse(function: FunctionType) -> ast.AST | None:
    try:
        source = textwrap.dedent(inspect.getsource(function))
        try:
            return ast.parse(source)
        except SyntaxError:
            # A lambda in the middle of an expression.
            return None
    except (OSError, TypeError):
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _globals(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def _root(thing: Any) -> str:
    return str(getattr(thing, "__module__", None) or "builtins").split(".")[0]
