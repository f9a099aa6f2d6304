"""A linear layer and its GELU within a longer forward: DistilBERT's, ALBERT's, BART's, Wav2Vec2's and Whisper's layers.

The forward runs as it is, dropout and all, with an object in the place of ``self`` whose linear layer computes both,
and whose GELU does nothing more. That is right where the code of the class uses the two in one place only, one after
the other, and ``self`` for nothing but its attributes: ``obstacle`` reads the code.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor

from sclkern.integrations.fuse.modules import Fused, Gelu, forced_backend, gelu_holds, kernels_run
from sclkern.integrations.fuse.structure import METHOD, changed
from sclkern.nn.linear_gelu import linear_gelu

# Names of the linear layer and of its GELU.
PAIRS = (
    ("lin1", "activation"),
    ("ffn", "activation"),
    ("fc1", "activation_fn"),
    ("intermediate_dense", "intermediate_act_fn"),
    ("dense", "transform_act_fn"),
)
# What transformers puts around the forward of a layer: gradient checkpointing, and new names of old arguments.
_CHECKPOINTING = ("transformers.modeling_layers", "forward_with_checkpointing")
_RENAMING = ("transformers.utils.deprecation", "wrapped_func")


class FusedWithin(Fused):
    """A module whose forward applies a GELU to the result of a linear layer, among other things."""

    _sclkern: Gelu

    def forward(self, *args, **options):
        """Compute the original forward, with bias and GELU in one kernel."""
        settings = self._sclkern
        first: Any = getattr(self, settings.first)
        if not gelu_holds(self, settings) or changed(self, settings.attributes) or not kernels_run(first.weight):
            return super().forward(*args, **options)
        # The fused class is a subclass, whose own forward transformers has made one that checkpoints.
        forward = _unwrapped(self._original.forward, _CHECKPOINTING)
        return forward(_Stand(self, settings), *args, **options)


class _Stand:
    """What a forward sees as ``self``."""

    def __init__(self, module: Any, settings: Gelu) -> None:
        first, gelu = getattr(module, settings.first), getattr(module, settings.gelu)
        done = []

        def compute(x: Tensor) -> Tensor:
            if not kernels_run(x):
                hidden: Tensor = first(x)
                return hidden
            done.append(True)
            return linear_gelu(x, first.weight, first.bias, settings.kind, forced_backend())

        def finish(x: Tensor) -> Tensor:
            result: Tensor = x if done and done.pop() else gelu(x)
            return result

        self.__dict__ |= {"_module": module, settings.first: compute, settings.gelu: finish}

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__["_module"]
        method = inspect.getattr_static(module._original, name, None)
        return MethodType(method, self) if isinstance(method, FunctionType) else getattr(module, name)


def only_methods(attributes: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """Of ``structure.attributes``, the methods: a forward that runs as it is reads all else anew."""
    return tuple((name, value) for name, value in attributes if value is METHOD)


def obstacle(cls: Any, first: str, gelu: str) -> str | None:
    """The reason why a linear layer and a GELU cannot be computed at once, or None.

    Args:
        cls: class of the module.
        first: name of the linear layer.
        gelu: name of the GELU.

    Returns:
        The reason, such as "its code does not apply its activation_fn to the result of its fc1".
    """
    return _obstacle(cls, first, gelu)


@functools.cache
def _obstacle(cls: Any, first: str, gelu: str) -> str | None:
    uses = {first: 0, gelu: 0}
    pairs, waiting, seen = 0, ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        tree = _parse(inspect.getattr_static(cls, name))
        if tree is None:
            return f"its {name} is decorated, or has no source"
        own = tree.args.args[0].arg if tree.args.args else ""
        whole = {id(node.value): node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in ("super", own):
                attribute = whole.get(id(node))
                if node.id == "super" or attribute is None:
                    return "its code uses self for more than its attributes"
                if attribute.startswith("__"):
                    return f"its code uses {attribute}, which says what self is"
                uses |= {attribute: uses.get(attribute, 0) + 1}
            elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                return f"its code sets {ast.unparse(node)}"
        pairs += sum(1 for _ in _pairs(tree, f"{own}.{first}", f"{own}.{gelu}"))
        for attribute in uses:
            member = inspect.getattr_static(cls, attribute, None)
            if isinstance(member, FunctionType):
                waiting.append(attribute)
            elif isinstance(member, property | staticmethod | classmethod):
                return f"its code uses {attribute}, which is a {type(member).__name__}"
    if (uses[first], uses[gelu], pairs) != (1, 1, 1):
        return f"its code does not apply its {gelu} to the result of its {first}, once, and use neither elsewhere"
    return None


def _pairs(tree: ast.AST, first: str, gelu: str) -> Iterator[ast.AST]:
    """``gelu(first(x))``, or ``y = first(x)`` followed by ``y = gelu(y)``."""
    for node in ast.walk(tree):
        if _calls(node, gelu) and _calls(node.args[0], first):  # type: ignore[attr-defined]
            yield node
        for statements in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            for one, two in itertools.pairwise(statements if isinstance(statements, list) else ()):
                assign = isinstance(one, ast.Assign) and isinstance(two, ast.Assign)
                if not assign or not (_calls(one.value, first) and _calls(two.value, gelu)):
                    continue
                names = [*map(ast.unparse, one.targets), *map(ast.unparse, two.targets), ast.unparse(two.value.args[0])]
                if len(names) == 3 and names[0].isidentifier() and len(set(names)) == 1:
                    yield two


def _calls(node: ast.AST, name: str) -> bool:
    """Whether it is a call of this name with one argument."""
    one = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
    return one and ast.unparse(node.func) == name and not isinstance(node.args[0], ast.Starred)  # type: ignore[attr-defined]


def _unwrapped(function: Any, *wrappers: tuple[str, str]) -> Any:
    """A function without what these wrappers of transformers (module, name of their function) put around it."""
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        if (function.__globals__.get("__name__"), function.__code__.co_name) not in wrappers:
            break
        function = function.__wrapped__
    return function


def _parse(function: Any) -> ast.FunctionDef | None:
    function = _unwrapped(function, _CHECKPOINTING, _RENAMING)
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None
