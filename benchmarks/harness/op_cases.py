"""The benchmark cases of ops: every op of ``SPECS`` at its sizes, with every implementation and in every pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.implementations import DTYPES, Implementation, implementations
from benchmarks.harness.torch_baselines import TORCH_BASELINES
from sclkern.tools.specs import SPECS, Size

IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    op: (*implementations(op), *TORCH_BASELINES.get(op, ()), *BASELINES.get(op, ())) for op in SPECS
}
# On a CPU torch.compile takes many seconds for each case: only ops whose time goes into memory, not into products.
COMPILED_ON_CPU = ("attention", "bias_gelu", "completion_loss", "dropout_add_layer_norm", "embed_patches")


@dataclass(frozen=True)
class Case:
    """One figure: an op at a size, in a dtype, by one implementation, in one pass.

    Attributes:
        op: name of the op.
        size: its size.
        dtype: of the features.
        implementation: what computes it.
        pass_: "forward", "backward" or "both".
    """

    op: str
    size: Size
    dtype: torch.dtype
    implementation: Implementation
    pass_: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "/".join((self.op, self.size.name.replace(" ", "-"), dtype, self.pass_, self.implementation.name))

    @property
    def priority(self) -> int:
        """1 to 3: that of the size, at least 2 for a backward alone and 3 for dtypes other than bfloat16 on a GPU."""
        second = self.pass_ == "backward" or self.implementation.name == "sdpa-math"
        third = torch.cuda.is_available() and self.dtype != torch.bfloat16
        return max(self.size.priority, 2 if second else 1, 3 if third else 1)


def cases(gpu: bool) -> list[Case]:
    """All cases for a GPU or for a CPU; neighbours share their inputs."""
    return [
        Case(op, size, dtype, implementation, pass_)
        for op, spec in SPECS.items()
        for size in spec.sizes_on(gpu)
        for dtype in (DTYPES if gpu and spec.differentiable else DTYPES[-1:])
        for implementation in IMPLEMENTATIONS[op]
        for pass_ in (spec.passes if gpu else _passes_on_cpu(op, size, implementation))
    ]


def _passes_on_cpu(op: str, size: Size, implementation: Implementation) -> tuple[str, ...]:
    """Other libraries and torch.compile have one case an op on a CPU."""
    spec = SPECS[op]
    if implementation.name in ("sclkern", "eager"):
        return spec.passes
    if not (implementation.package or implementation.compiled):
        return tuple(pass_ for pass_ in spec.passes if pass_ != "backward")
    once = size is spec.cpu_sizes[0] and (implementation.package or op in COMPILED_ON_CPU)
    return spec.passes[-1:] if once else ()
