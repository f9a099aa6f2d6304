"""What a candidate launches, and what the machine code of it uses, without a GPU.

The launchers of ``sclkern.kernels`` run on tensors without memory while their launches are recorded: what is compiled
is what the real call would launch, with the same constants, options and alignments.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from benchmarks.tuning.candidates import BOTH_PASSES, Candidate
from sclkern.kernels.config import override
from sclkern.kernels.launch import Launch, recorded
from sclkern.tools.specs import SPECS
from sclkern.tools.static.compilation import TARGETS, Resources, resources


def configured(candidate: Candidate) -> AbstractContextManager[None]:
    """Inside, every call of the op launches the candidate's kernels with its values."""
    return override(candidate.kernels if candidate.values else (), **candidate.values)


def launches(candidate: Candidate, dropout: bool = True) -> list[Launch]:
    """The launches of one call of the op in the candidate's pass, in bfloat16, equal ones once.

    Args:
        candidate: of which the values are set.
        dropout: with the size's dropout, or without.

    Returns:
        The launches in their order.

    Raises:
        ValueError: no kernel of the candidate is launched, or its values do not fit.
    """
    spec = SPECS[candidate.op]
    inputs = spec.inputs(candidate.size.values, torch.bfloat16, "meta")
    dropout_p = candidate.size.dropout_p if dropout else 0.0
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
    with configured(candidate), recorded() as calls:
        backward = spec.launch(inputs, dropout_p, seed)
        if candidate.pass_ == "backward" and backward is not None:
            calls.clear()
            backward()
    if candidate.choice not in BOTH_PASSES and not any(launch.config.kernel in candidate.kernels for launch in calls):
        raise ValueError(f"{', '.join(candidate.kernels)}: not launched at these lengths")
    return list({launch.key: launch for launch in calls}.values())


def changed(candidate: Candidate, present: list[Launch]) -> list[Launch]:
    """The launches that are not among those of the present configuration."""
    known = {launch.key for launch in present}
    return [launch for launch in launches(candidate) if launch.key not in known]


@dataclass(frozen=True)
class Compiled:
    """A launch after compilation.

    Attributes:
        hash: what Triton keeps the binary by, here and in another process.
        num_warps: warps of a program.
        used: what the machine code uses.
    """

    hash: str
    num_warps: int
    used: Resources


def compile_launches(
    candidate: Candidate, dropout: bool, keys: Iterable[tuple[Any, ...]], target: str
) -> list[Compiled]:
    """Compile some launches of a candidate, in a process of its own: Triton's target is set there for good.

    Args:
        candidate: as of ``launches``.
        dropout: as of ``launches``.
        keys: the ``Launch.key`` of those that are wanted.
        target: a name of ``compilation.TARGETS``.

    Returns:
        One for each key. The binaries are in Triton's cache, where the process that launches them finds them.
    """

    class Driver:
        def get_current_device(self) -> str:
            return target

        def get_current_stream(self, device: str) -> int:
            return 0

        def get_current_target(self) -> Any:
            return TARGETS[target]

    triton.runtime.driver.set_active(Driver())
    by_key = {launch.key: launch for launch in launches(candidate, dropout)}
    binaries = [by_key[key].kernel.warmup(grid=by_key[key].grid, **by_key[key].arguments) for key in keys]
    return [Compiled(binary.hash, binary.metadata.num_warps, resources(binary)) for binary in binaries]
