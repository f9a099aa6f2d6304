"""Forms of the ops on a CPU: the numbers of their definitions, in fewer passes over memory.

The ops take them under ``backend="auto"`` where no kernel runs; they have one derivative. What needs a definition
itself, such as a functional transform, is left to it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def problems(*tensors: Tensor | None) -> tuple[str, ...]:
    """Why forms with derivatives of their own cannot take these tensors; nothing if they can."""
    if torch.compiler.is_compiling():
        return ("a form with its own derivative is not compiled",)
    if torch._C._are_functorch_transforms_active():
        return ("a form with its own derivative has no functional transforms",)
    if any(tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return ("a form with its own derivative takes plain tensors",)
    return ()
