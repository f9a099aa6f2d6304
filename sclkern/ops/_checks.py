"""Checks of arguments: the same wrong input raises the same error in every op.

A wrong Python type or dtype is a ``TypeError``; a wrong shape, device, number or name is a ``ValueError``. A message
names the argument, what came and what was expected. A bool is not taken for a number.

``floating``, ``dtype`` and ``rank`` come first: they refuse what is no tensor, None too (``given`` drops optional
arguments that are None). The checks after them skip None.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The optional arguments that are not None.

    Args:
        **tensors: by the name of the argument.

    Returns:
        Those that are tensors, by name.
    """
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def floating(**tensors: Tensor) -> None:
    """Each is a floating-point tensor.

    Args:
        **tensors: by the name of the argument.
    """
    for name, tensor in tensors.items():
        if not _tensor(name, tensor).is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")


def dtype(expected: torch.dtype, **tensors: Tensor) -> None:
    """Each is a tensor of this dtype.

    Args:
        expected: the only dtype that is taken.
        **tensors: by the name of the argument.
    """
    for name, tensor in tensors.items():
        if _tensor(name, tensor).dtype != expected:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {expected}")


def same_dtype(like: str, first: Tensor, **tensors: Tensor | None) -> None:
    """Each is a tensor of the dtype of another argument, or None.

    Args:
        like: name of that argument.
        first: that argument.
        **tensors: by the name of the argument.
    """
    for name, tensor in tensors.items():
        if tensor is not None and _tensor(name, tensor).dtype != first.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected that of {like}, {first.dtype}")


def same_device(like: str, first: Tensor, **tensors: Any) -> None:
    """Each tensor is on the device of another argument; what is no tensor is skipped.

    Args:
        like: name of that argument.
        first: that argument.
        **tensors: by the name of the argument.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != first.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of {like}, {first.device}")


def shape(form: str, expected: tuple[int | None, ...], **tensors: Tensor | None) -> None:
    """Each has this shape, or is None.

    Args:
        form: the shape in letters, as the docstring has it, such as "(B, Lk)".
        expected: the shape in numbers; None is any size.
        **tensors: by the name of the argument.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        actual = _tensor(name, tensor).shape
        if actual != expected and (len(actual) != len(expected) or _differ(actual, expected)):
            sizes = ", ".join("any" if size is None else str(size) for size in expected)
            sizes = f"({sizes},)" if len(expected) == 1 else f"({sizes})"
            raise ValueError(f"{name}: got shape {tuple(actual)}, expected {form} = {sizes}")


def rank(form: str, dimensions: Collection[int], **tensors: Tensor) -> None:
    """Each has one of these numbers of dimensions.

    Args:
        form: the shapes in letters, such as "(N, D) or (G, N, D)".
        dimensions: the numbers that are taken.
        **tensors: by the name of the argument.
    """
    for name, tensor in tensors.items():
        if _tensor(name, tensor).ndim not in dimensions:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {form}")


def number(name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf) -> None:
    """A finite number within bounds.

    Args:
        name: of the argument.
        value: what came.
        lowest: the smallest number that is taken.
        highest: the largest number that is taken.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (lowest <= value <= highest and -math.inf < value < math.inf):
        raise ValueError(f"{name}: got {value}, expected {_range('a finite number', lowest, highest)}")


def positive(name: str, value: Any) -> None:
    """A finite number above 0.

    Args:
        name: of the argument.
        value: what came.
    """
    number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: got {value}, expected a positive number")


def probability(name: str, value: Any) -> None:
    """A number from 0 to 1.

    Args:
        name: of the argument.
        value: what came.
    """
    number(name, value, 0, 1)


def integer(name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf) -> None:
    """An integer within bounds.

    Args:
        name: of the argument.
        value: what came.
        lowest: the smallest that is taken.
        highest: the largest that is taken.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if not lowest <= value <= highest:
        raise ValueError(f"{name}: got {value}, expected {_range('an int', lowest, highest)}")


def boolean(name: str, value: Any) -> None:
    """True or False.

    Args:
        name: of the argument.
        value: what came.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")


def choice(name: str, value: Any, known: Collection[Any]) -> None:
    """One of the known names.

    Args:
        name: of the argument.
        value: what came.
        known: what is taken.
    """
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, known))}")


def seed(value: Any, device: torch.device, *, optional: bool = True) -> None:
    """An int, an int64 tensor of one element on the device of the op, or None.

    Args:
        value: what came.
        device: of the op; "cuda" without a number is any CUDA device.
        optional: whether None is taken.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed: got {value.dtype}, expected torch.int64")
        if value.numel() != 1:
            raise ValueError(f"seed: got shape {tuple(value.shape)}, expected one element")
        if value.device.type != device.type or device.index not in (None, value.device.index):
            raise ValueError(f"seed: got device {value.device}, expected {device}")
    elif isinstance(value, bool) or not (isinstance(value, int | torch.SymInt) or (optional and value is None)):
        expected = "an int, an int64 tensor of one element" + (" or None" if optional else "")
        raise TypeError(f"seed: got {type(value).__name__}, expected {expected}")


def dropout_ids(form: str, expected: tuple[int, ...], like: str, first: Tensor, value: Any) -> None:
    """An int64 tensor of this shape on the device of another argument, or None.

    Args:
        form: the shape in letters.
        expected: the shape in numbers.
        like: name of that argument.
        first: that argument.
        value: what came.
    """
    if value is not None:
        dtype(torch.int64, dropout_ids=value)
        shape(form, expected, dropout_ids=value)
        same_device(like, first, dropout_ids=value)


def _differ(actual: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return any(e is not None and a != e for a, e in zip(actual, expected, strict=True))


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    return value


def _range(kind: str, lowest: float, highest: float) -> str:
    if highest == math.inf:
        return kind if lowest == -math.inf else f"{kind} of at least {lowest}"
    return f"{kind} from {lowest} to {highest}"
