"""What a module of somebody else consists of, so that nothing of it is overlooked."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# An attribute that a module does not have, and a method of its class; both can be pickled.
MISSING, METHOD = ..., NotImplemented
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)

# Names and values of the plain attributes that a module's code reads.
Attributes = tuple[tuple[str, Any], ...]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does exactly what its class ``kind`` does: no subclass, hooks or own forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks) and "forward" not in module.__dict__


def child_obstacle(module: nn.Module, **kinds: type[nn.Module]) -> str | None:
    """The reason why an op cannot stand for children of a module.

    Args:
        module: their parent.
        **kinds: the class that each child must have, by its name.

    Returns:
        The reason, such as "its dense carries hooks", or None.
    """
    for name, kind in kinds.items():
        child = getattr(module, name)
        if type(child) is not kind:
            return f"its {name} is {type(child).__name__}, not torch's {kind.__name__}"
        if not is_plain(child, kind):
            return f"its {name} carries hooks, or another forward"
        for parameter in child.parameters():
            if parameter.is_meta:
                return "its parameters are on the meta device"
            if not parameter.is_floating_point():
                return f"its {name} has weights of {str(parameter.dtype).removeprefix('torch.')}"
    return None


def beyond(module: nn.Module, *children: str) -> str | None:
    """What a module has beside the declared children, which its forward may use.

    Args:
        module: the module.
        *children: names of the children that a rule declares.

    Returns:
        The reason to leave it, such as "it also has the parameter scale", or None.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    for kind, members in (
        ("", module._modules),
        ("the parameter ", module._parameters),
        ("the buffer ", module._buffers),
    ):
        more = [name for name, member in members.items() if member is not None and name not in children]
        if more:
            return f"it also has {kind}{', '.join(more)}"
    for name, value in _read_attributes(module):
        if name not in children and not _is_data(value):
            return f"its code reads {name}, which is {type(value).__name__}"
    return None


def attributes(module: nn.Module, *others: str) -> Attributes:
    """The plain attributes that a module's code reads, with their values now.

    Args:
        module: the module.
        *others: attributes that are not to be listed.

    Returns:
        Names and values; ``MISSING`` for a name that the code looks up and that is not there, ``METHOD`` for a method.
    """
    found = ((name, value) for name, value in _read_attributes(module) if name not in others and _is_data(value))
    cls: Any = type(module)
    methods = sorted(name for name in _code_names(cls)[0] if _is_method(cls, name))
    return (*((name, copy.deepcopy(value)) for name, value in found), *((name, METHOD) for name in methods))


def changed(module: nn.Module, before: Attributes) -> str | None:
    """The name of an attribute that no longer has the value it had, or None."""
    for name, value in before:
        if name in module.__dict__ if value is METHOD else getattr(module, name, MISSING) != value:
            return name
    return None


def signature(thing: Any) -> Any:
    """What an activation is: its class and plain attributes, or the function itself. Equal for copies.

    Args:
        thing: module or function.

    Returns:
        Something to compare.
    """
    if isinstance(thing, functools.partial):
        return (thing.func, thing.args, tuple(sorted(thing.keywords.items())))
    if not isinstance(thing, nn.Module):
        return thing
    values = ((name, value) for name, value in thing.__dict__.items() if name != "training" and _is_data(value))
    return (type(thing), tuple((name, value) for name, value in values if not name.startswith("_")))


def configuration(module: nn.Module) -> tuple[Any, ...]:
    """All of a module that a trial's outcome depends on, except the values of its parameters.

    Args:
        module: the module.

    Returns:
        Equal, and equally printed, for modules that need one trial.
    """
    shapes = [(name, tuple(p.shape), str(p.dtype), str(p.device)) for name, p in module.named_parameters()]
    children = [(name, repr(child)) for name, child in module.named_modules()]
    classes = (type(child) for child in module.modules())
    return (repr((shapes, children, attributes(module))), *classes, *_functions(module))


def clone(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A copy without hooks, with parameters of its own: random ones, the same in each copy.

    The values of today say nothing about a gate that is zero, or a scale that is one, until it learns.

    Args:
        module: the module; its attributes are shared unless they are lists or dictionaries.
        device: of the copy.
        dtype: of the copy.

    Returns:
        The copy.
    """
    generator = torch.Generator().manual_seed(0)

    def copied(value: nn.Module) -> nn.Module:
        new: nn.Module = type(value).__new__(type(value))
        for name, entry in value.__dict__.items():
            # Hooks, parameters, buffers and children are dictionaries.
            new.__dict__[name] = type(entry)() if "hooks" in name else copy.copy(entry)
        new._parameters = {name: drawn(name, entry) for name, entry in value._parameters.items()}
        new._buffers = {name: None if entry is None else entry.clone() for name, entry in value._buffers.items()}
        new._modules = {name: None if child is None else copied(child) for name, child in value._modules.items()}
        return new

    def drawn(name: str, parameter: Tensor | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        values = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        shift = float(parameter.ndim == 1 and name == "weight")
        return nn.Parameter((scale * values + shift).to(device, dtype))

    return copied(module)


def _is_method(cls: type[nn.Module], name: str) -> bool:
    """Whether a name is a method that an instance may replace, and none of torch's."""
    return name not in dir(nn.Module) and inspect.isroutine(inspect.getattr_static(cls, name, None))


def _is_data(value: Any) -> bool:
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(map(_is_data, value.values())) and all(map(_is_data, value))
    return value is MISSING or isinstance(value, _PLAIN)


def _functions(module: nn.Module) -> Iterator[Any]:
    """Functions among a module's attributes."""
    yield from (value for value in module.__dict__.values() if isinstance(value, FunctionType))


def _read_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes, of the instance or its class, that the class's own code names."""
    cls: Any = type(module)
    names, texts = _code_names(cls)
    members = {*module._modules, *module._parameters, *module._buffers, "training"}
    for name in sorted((names | texts) - members):
        own = module.__dict__.get(name, MISSING)
        value = inspect.getattr_static(type(module), name, MISSING) if own is MISSING else own
        if value is MISSING and name not in texts:
            continue
        if own is MISSING and (inspect.isroutine(value) or isinstance(value, property) or name in dir(nn.Module)):
            continue
        yield name, value


@functools.cache
def _code_names(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names and identifier-like texts in the code of a class, up to torch's own classes, without ``__init__``."""
    names: set[str] = set()
    texts: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins"):
            break
        functions = [getattr(value, "__func__", getattr(value, "fget", value)) for value in vars(base).values()]
        waiting = [
            function.__code__
            for function in map(inspect.unwrap, filter(callable, functions))
            if isinstance(function, FunctionType) and function.__name__ != "__init__"
        ]
        while waiting:
            code = waiting.pop()
            names.update(code.co_names)
            texts.update(text for text in code.co_consts if isinstance(text, str) and text.isidentifier())
            waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(names), frozenset(texts)
