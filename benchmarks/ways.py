"""A way of computing an op, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Most important first; a CPU takes the last.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What is not ours may round more than the definition does: float32 sums in another order, sums in half precision.
SLACK = 6.0


class UnableError(Exception):
    """A baseline cannot compute this; the message begins with its name."""


@dataclass(frozen=True)
class Way:
    """``run(inputs, dropout_p, seed)`` returns what the op returns.

    Attributes:
        seeded: draws the op's own dropout mask from a seed; another way is checked without dropout.
        compiled: run by torch.compile.
        package: the library that must be installed.
        slack: factor of the errors that are allowed.
        dropout: has dropout; without, it is timed without, and its record says so.
        backward: has one.
        without: arguments that it does not take; the check leaves them out as well.
        dtypes: those that it takes.
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
