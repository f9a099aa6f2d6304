"""An implementation of an op, and the three that every op has: sclkern, its eager definition, that one compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sclkern import ops
from sclkern.tools.specs import SPECS

# Most important first; benchmarks on a CPU use the last.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Other implementations may round more than the definition: they sum float32 in another order, or in half precision.
SLACK = 6.0


class UnsupportedError(Exception):
    """A baseline cannot compute a case; the message starts with the baseline's name."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: name in cases and records.
        run: ``run(inputs, dropout_p, seed)`` returns what the op returns.
        seeded: draws the op's own dropout mask from a seed; others are checked without dropout.
        compiled: run under torch.compile.
        package: the library that must be installed, "" for none.
        slack: factor of the allowed errors.
        dropout: has dropout; others are timed without, and their records say so.
        backward: has a backward.
        without: arguments that it does not take; the check leaves them out as well.
        dtypes: supported dtypes.
        reads_back: waits for values of the GPU, so that no CUDA graph can be captured.
    """

    name: str
    run: Callable[..., object]
    seeded: bool = False
    compiled: bool = False
    package: str = ""
    slack: float = SLACK
    dropout: bool = True
    backward: bool = True
    without: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES
    reads_back: bool = False


def definition(op: str) -> Callable[..., object]:
    """``run`` of the eager definition of an op."""

    def run(inputs: dict, dropout_p: float, seed: Tensor | None) -> object:
        return SPECS[op].definition(**inputs, **_dropout(dropout_p, seed))

    return run


def _fused(op: str) -> Callable[..., object]:
    def run(inputs: dict, dropout_p: float, seed: Tensor | None) -> object:
        return getattr(ops, op)(**inputs, **_dropout(dropout_p, seed))

    return run


def _dropout(dropout_p: float, seed: Tensor | None) -> dict:
    return {"dropout_p": dropout_p, "seed": seed} if dropout_p else {}


def implementations(op: str) -> tuple[Implementation, ...]:
    """The op, its eager definition, and the definition compiled."""
    return (
        Implementation("sclkern", _fused(op), seeded=True, slack=1.0),
        Implementation("eager", definition(op), seeded=True, slack=1.0),
        Implementation("compile", definition(op), compiled=True),
    )
