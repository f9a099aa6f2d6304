"""The sanitizer's place in Triton's interpreter: every launch, pointer and access passes here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from sanitizer import replace
from sanitizer.memory import ATOMIC, SEVERAL, Argument, Meeting, Memory, SanitizerError, is_poison

TRITON = f"{Path(triton.__file__).parent}{os.sep}"
OURS = f"{Path(__file__).parent}{os.sep}"


class Pointer(tl.pointer_type):
    """The type of a pointer that was computed from ``argument``; the interpreter hands types on with values."""

    def __init__(self, element_ty: tl.dtype, argument: Argument) -> None:
        super().__init__(element_ty)
        self.argument = argument


class Launch:
    """The launch that runs.

    Attributes:
        kernel: its name.
        memory: its arguments; None until they are known.
        languages: modules of ``triton.language`` that the interpreter has put its own functions into.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.memory: Memory | None = None
        self.languages: set[int] = set()


_running: list[Launch] = []


def _call(original, self, *arguments, **options):
    """Of a ``GridExecutor``: a launch. A fault leaves it as it is, not as a message of the interpreter."""
    _running.append(Launch(self.fn.__name__))
    try:
        return original(self, *arguments, **options)
    except interpreter.InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SanitizerError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    finally:
        _running.pop()


def _init_args_hst(original, self, args_dev, kwargs):
    """Of a ``GridExecutor``: the arguments as the kernel gets them."""
    positional, named = original(self, args_dev, kwargs)
    values = dict(zip(self.arg_names, positional, strict=False)) | named
    _running[-1].memory = Memory([found for name, value in values.items() for found in _tensors(name, value)])
    return positional, named


def _tensors(name: str, value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in a value of an argument."""
    if isinstance(value, tuple):
        return [found for item in value for found in _tensors(name, item)]
    value = interpreter._unwrap_tensor(getattr(value, "base", value))
    return [(name, value)] if isinstance(value, Tensor) else []


def _implicit_cvt(original, value):
    """A pointer to a tensor knows its argument."""
    converted = original(value)
    if _running and hasattr(value, "data_ptr"):
        argument = _running[-1].memory.arguments[value.data_ptr()]
        converted.handle.dtype = Pointer(converted.handle.dtype.element_ty, argument)
    return converted


def _create_bitcast(original, self, src, dst_type):
    """A pointer to elements of another type keeps its argument."""
    result = original(self, src, dst_type)
    if isinstance(src.dtype, Pointer) and isinstance(result.dtype, tl.pointer_type):
        result.dtype = Pointer(result.dtype.element_ty, src.dtype.argument)
    return result


class Access:
    """One load, store or atomic of a program.

    Attributes:
        argument: whose memory it is.
        offsets: (lanes,) int64, bytes from the beginning of the storage, of the lanes that take part.
        size: bytes of an element.
        program: number of the program, from 1.
    """

    def __init__(self, kind: str, builder: InterpreterBuilder, ptrs: Any, mask: Any) -> None:
        self.kind, self.builder = kind, builder
        addresses, wanted = np.asarray(ptrs.data), np.asarray(mask.data)
        self.wanted = None if wanted.all() else np.broadcast_to(wanted, addresses.shape)
        addresses = addresses.reshape(-1) if self.wanted is None else addresses[self.wanted]
        self.size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        (x, y, z), (width, height, _) = builder.grid_idx, builder.grid_dim
        self.program = 1 + x + width * (y + height * z)
        if isinstance(ptrs.dtype, Pointer):
            self.argument = ptrs.dtype.argument
        elif addresses.size:
            self.argument = _running[-1].memory.holding(int(addresses[0]))
            if self.argument is None:
                raise SanitizerError(f"{self._place()}: {kind} at address {addresses[0]:#x}, which is of no argument")
        if not addresses.size:
            self.offsets = np.zeros(0, np.int64)
            return
        storage = self.argument.storage
        # An address below the storage wraps around and lies far above it.
        offsets = addresses - np.uint64(storage.start)
        outside = (offsets > np.uint64(max(0, storage.size - self.size))) | (storage.size < self.size)
        self.offsets = offsets.astype(np.int64)
        if outside.any():
            first, end = -(self.argument.start // self.size), (storage.size - self.argument.start) // self.size
            side = "before the start" if self._element(outside) < first else "behind the end"
            self.fail(outside, f"{side} of its storage, which has elements {first} to {end - 1}")
        misaligned = self.offsets + storage.start & self.size - 1 != 0
        if misaligned.any():
            self.fail(misaligned, f"at an address that is not a multiple of {self.size} bytes")

    def values(self, data: Any) -> np.ndarray:
        """(lanes,): the elements of what is stored or loaded that take part."""
        data = np.asarray(data)
        return data.reshape(-1) if self.wanted is None else np.broadcast_to(data, self.wanted.shape)[self.wanted]

    @property
    def units(self) -> np.ndarray:
        """Units of the storage that it touches."""
        return self.argument.storage.units(self.offsets, self.size)

    def fail(self, lanes: np.ndarray, why: str) -> None:
        """Raise a fault of these lanes."""
        count, tensor = int(np.count_nonzero(lanes)), self.argument.tensors[0]
        others = f" ({count} of {lanes.size} lanes)" if lanes.size > 1 else ""
        raise SanitizerError(
            f"{self._place()}: {self.kind} of {self.argument} at element {self._element(lanes)}{others}, {why}; "
            f"{self.argument} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, strides "
            f"{tuple(tensor.stride())}"
        )

    def _element(self, lanes: np.ndarray) -> int:
        """Elements from the beginning of the argument to the first of the lanes."""
        return int((self.offsets[lanes][0] - self.argument.start) // self.size)

    def _place(self) -> str:
        """Kernel, program and line."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith((TRITON, OURS)):
            frame = frame.f_back
        line = f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"
        return f"{_running[-1].kernel}, program {tuple(map(int, self.builder.grid_idx))}, {line}"

    def meet(self, meeting: Meeting | None) -> None:
        """Raise a fault if programs have met."""
        if meeting is None:
            return
        width, height, _ = self.builder.grid_dim
        x, rest = (meeting.other - 1) % width, (meeting.other - 1) // width
        named = {SEVERAL: "several programs", ATOMIC: "an atomic"}
        other = named.get(meeting.other, f"program {(int(x), int(rest % height), int(rest // height))}")
        lanes = meeting.where.reshape(self.offsets.size, -1).any(1)
        self.fail(lanes, f"{meeting.what} by {other} in the same launch")


def _create_masked_load(original, self, ptrs, mask, other, *options):
    access = Access("load", self, ptrs, mask)
    result = original(self, ptrs, mask, other, *options)
    if access.offsets.size:
        access.meet(access.argument.storage.read(access.units, access.program))
        # A byte may have any value, unless it is a bool. Floating poison may be read, if a selection removes it.
        integers = access.size > 1 and not ptrs.get_element_ty().is_floating()
        if integers or access.argument.tensors[0].dtype == torch.bool:
            unwritten = is_poison(access.values(result.data))
            if unwritten.any():
                access.fail(unwritten, "which nobody has written")
    return result


def _create_masked_store(original, self, ptrs, value, mask, *options):
    access = Access("store", self, ptrs, mask)
    if access.offsets.size:
        _check_elements(access)
        access.meet(access.argument.storage.write(access.units, access.program))
        values = access.values(np.broadcast_to(np.asarray(value.data), np.asarray(ptrs.data).shape))
        clashes = access.argument.storage.clashes(access.offsets, values)
        if clashes is not None:
            access.fail(clashes, "to which another lane stores another value")
    return original(self, ptrs, value, mask, *options)


def _check_elements(access: Access) -> None:
    lacking = access.argument.lacks(access.offsets)
    if lacking is not None:
        access.fail(lacking, "which is in its storage but not in the tensor")


def _atomic(self, ptr, mask) -> None:
    access = Access("atomic", self, ptr, mask)
    if access.offsets.size:
        if ptr.get_element_ty().is_floating():
            access.fail(np.ones(access.offsets.size, bool), "whose result depends on the order of the programs")
        _check_elements(access)
        access.meet(access.argument.storage.write(access.units, access.program, atomic=True))


def _create_atomic_rmw(original, self, rmw_op, ptr, val, mask, *options):
    _atomic(self, ptr, mask)
    return original(self, rmw_op, ptr, val, mask, *options)


def _create_atomic_cas(original, self, ptr, *options):
    _atomic(self, ptr, interpreter.TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1))
    return original(self, ptr, *options)


def _patch_lang(original, function):
    """Once for each launch and module, not for each call of a device function: that takes milliseconds."""
    modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if _running and modules <= _running[-1].languages:
        return interpreter._LangPatchScope()
    if _running:
        _running[-1].languages |= modules
    return original(function)


PATCHES = {
    (interpreter, "_implicit_cvt"): _implicit_cvt,
    (interpreter, "_patch_lang"): _patch_lang,
    (GridExecutor, "__call__"): _call,
    (GridExecutor, "_init_args_hst"): _init_args_hst,
    (InterpreterBuilder, "create_bitcast"): _create_bitcast,
    (InterpreterBuilder, "create_masked_load"): _create_masked_load,
    (InterpreterBuilder, "create_masked_store"): _create_masked_store,
    (InterpreterBuilder, "create_atomic_rmw"): _create_atomic_rmw,
    (InterpreterBuilder, "create_atomic_cas"): _create_atomic_cas,
}


def install() -> None:
    """Check every launch from now on."""
    if hasattr(GridExecutor.__call__, "__wrapped__"):
        return
    for (owner, name), replacement in PATCHES.items():
        replace(owner, name, replacement)
