"""How a candidate of ``candidates.py`` is set, what is then launched, and what its machine code uses, without a GPU.

The launchers of ``sclkern.kernels`` run on tensors without memory while every launch is caught: what is compiled is
what the real call would launch, with the same constants, options and alignments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.candidates import Candidate
from sclkern.tools.specs import SPECS
from sclkern.tools.static.compilation import TARGETS

# What is replaced: "module.name" of sclkern.kernels, and the new object from the present one.
Changes = dict[str, Callable[[Any], Any]]


def _returned(name: str) -> Callable[[dict], Changes]:
    """Values beside what a function returns, a dict of a launch's constants and options."""

    def changes(values: dict) -> Changes:
        return {name: lambda present: lambda *arguments: {**present(*arguments), **values}}

    return changes


def _merged(name: str) -> Callable[[dict], Changes]:
    return lambda values: {name: lambda present: {**present, **values}}


def _constants(module: str) -> Callable[[dict], Changes]:
    return lambda values: {f"{module}.{name}": lambda present, value=value: value for name, value in values.items()}


def _planned(kernel: str, spread: str) -> Callable[[dict], Changes]:
    """One launch of the backward of attention; ``spread`` names the tile of the rows that are spread over programs."""

    def changes(values: dict) -> Changes:
        def change(present):
            def plan(*arguments):
                chosen = getattr(import_module("sclkern.kernels.attention_backward"), kernel)
                launches = present(*arguments)
                if not any(launched is chosen for launched, *_ in launches):
                    raise ValueError(f"{kernel}: not launched at these lengths")
                return [
                    (k, rows, values.get(spread, block), {**config, **values})
                    if k is chosen
                    else (k, rows, block, config)
                    for k, rows, block, config in launches
                ]

            return plan

        return {"attention_backward.backward_plan": change}

    return changes


def _tiles(table: str) -> Callable[[dict], Changes]:
    """Of ``frame_attention``: (rows, keys, warps) of two bytes and heads of 64 channels; stages go to every launch."""

    def changes(values: dict) -> Changes:
        def change(present):
            names = ("BLOCK_ROWS", "BLOCK_KEYS", "num_warps")
            first = tuple(values.get(name, old) for name, old in zip(names, present[2][0], strict=True))
            return {**present, 2: (first, present[2][1])}

        found = {f"frame_attention.{table}": change}
        if "num_stages" in values:
            stages = {"num_stages": values["num_stages"]}
            found |= _returned("frame_attention._constants")(stages)
        return found

    return changes


def _mixed(constants: str, *functions: str) -> Callable[[dict], Changes]:
    """``constants`` is "module.NAME": that value is a constant of the module, the others are what functions return."""
    module, constant = constants.split(".")

    def changes(values: dict) -> Changes:
        found = _constants(module)({name: value for name, value in values.items() if name == constant})
        rest = {name: value for name, value in values.items() if name != constant}
        for name in functions if rest else ():
            found |= _returned(name)(rest)
        return found

    return changes


CHOICES: dict[str, Callable[[dict], Changes]] = {
    "attention forward": _returned("attention.forward_configuration"),
    "attention by query": _planned("attention_backward_query_kernel", "BLOCK_QUERIES"),
    "attention by key": _planned("attention_backward_key_kernel", "BLOCK_KEYS"),
    "bias_gelu": _constants("bias_gelu"),
    "norm forward": _returned("dropout_add_layer_norm.configuration"),
    "norm backward": _mixed("dropout_add_layer_norm.ROWS_PER_PROGRAM", "dropout_add_layer_norm.configuration"),
    "cross_attention": _mixed("cross_attention.MAX_HELD", "cross_attention.configuration"),
    "similarities": _merged("completion_loss.HALF"),
    "splits": _constants("completion_loss"),
    "weights": _merged("completion_loss_backward.TILES"),
    "workspace": _constants("completion_loss_backward"),
    "words": _constants("linear_cross_entropy"),
    "frames by row": _tiles("BY_ROW"),
    "frames by key": _tiles("BY_KEY"),
    "embedding": _mixed(
        "embed_patches_backward.SLOTS",
        "embed_patches.row_configuration",
        "embed_patches_backward.row_configuration",
    ),
    "masks": _constants("masking"),
}


@contextmanager
def replaced(candidate: Candidate) -> Iterator[None]:
    """The candidate's values in place of the present ones.

    Raises:
        AttributeError: a name to be replaced is gone.
    """
    before = []
    try:
        for place, change in (CHOICES[candidate.choice](candidate.values) if candidate.values else {}).items():
            module_name, name = place.split(".")
            module = import_module(f"sclkern.kernels.{module_name}")
            if not hasattr(module, name):
                raise AttributeError(f"sclkern.kernels.{place}: gone, so that {candidate} cannot be set")
            present = getattr(module, name)
            before.append((module, name, present))
            setattr(module, name, change(present))
        yield
    finally:
        for module, name, present in reversed(before):
            setattr(module, name, present)


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def constants(self) -> dict[str, int]:
        """Tile sizes, warps and stages."""
        names = {p.name for p in self.kernel.params if p.is_constexpr} | {"num_warps", "num_stages"}
        return {name: value for name, value in self.arguments.items() if name in names}

    @property
    def key(self) -> tuple:
        """Equal for launches that differ in their tensors alone."""
        numbers = {n: v for n, v in self.arguments.items() if not isinstance(v, Tensor)}
        return self.kernel.fn.__name__, self.grid, tuple(sorted(numbers.items(), key=str))


def launches(candidate: Candidate, dropout: bool = True) -> list[Launch]:
    """Those of one call of the op in the candidate's pass, in bfloat16, each once; with the size's dropout or none."""
    found: dict[tuple, Launch] = {}

    def caught(kernel, *, grid, warmup, **arguments) -> None:
        launch = Launch(kernel, grid, arguments)
        found.setdefault(launch.key, launch)

    inputs = SPECS[candidate.op].inputs(candidate.size.values, torch.bfloat16, "meta")
    dropout_p = candidate.size.dropout_p if dropout else 0.0
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
    with replaced(candidate), mock.patch.object(JITFunction, "run", caught):
        backward = SPECS[candidate.op].launch(inputs, dropout_p, seed, {})
        if candidate.part == "backward":
            found.clear()
            backward()
    return list(found.values())


def changed(candidate: Candidate, present: list[Launch]) -> list[Launch]:
    """The launches that are not among those of the present configuration."""
    known = {launch.key for launch in present}
    return [launch for launch in launches(candidate) if launch.key not in known]


@contextmanager
def target(name: str = "sm_90") -> Iterator[None]:
    """Triton compiles for this target inside, with a GPU or without."""

    class Driver:
        def get_current_device(self) -> str:
            # Compiled kernels are kept by device: those of a real one are others.
            return name

        def get_current_stream(self, device: str) -> int:
            return 0

        def get_current_target(self):
            return TARGETS[name]

    config = triton.runtime.driver
    before = config._active
    config.set_active(Driver())
    try:
        yield
    finally:
        config._active = before


def compiled(launch: Launch) -> Any:
    """The kernel of a launch, for Triton's present target."""
    return launch.kernel.warmup(grid=launch.grid, **launch.arguments)
