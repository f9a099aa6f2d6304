"""Warnings that are given once."""

from __future__ import annotations

import functools
import warnings

import torch


def warn_once(message: str) -> None:
    """Warn, once for each message; never while torch.compile traces."""
    if not torch.compiler.is_compiling():
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"sclkern: {message}", stacklevel=4)
