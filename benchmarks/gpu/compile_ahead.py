"""Compile what ``make gpu`` will launch, on every core, beside its first stages: they find it in Triton's cache."""

from __future__ import annotations

import os
import sys

import torch

from sclkern import ObjectiveConfig, SCLConfig
from sclkern.kernels.config import assume, current_arch
from sclkern.kernels.launch import recorded
from sclkern.step import StepConfig
from sclkern.tools import warmup
from sclkern.tools.specs import SPECS


def kernels() -> list[warmup.Kernel]:
    """Of the planned step at batch 64, then of every op at the sizes of its benchmarks and tests, in bfloat16."""
    found = dict.fromkeys(
        warmup.kernels_of(
            SCLConfig.preset("base"), ObjectiveConfig(itm_negatives="dataset"), StepConfig(), rows=64, widths=(18,)
        )
    )
    # On tensors without memory, for the GPU that is there.
    with assume(current_arch(torch.device("cuda", 0))):
        for spec in SPECS.values():
            for size in (*spec.sizes, *spec.accuracy):
                seed = torch.empty(1, dtype=torch.int64, device="meta") if size.dropout_p else None
                with recorded() as launches:
                    try:
                        backward = spec.launch(spec.inputs(size.values, torch.bfloat16, "meta"), size.dropout_p, seed)
                        if backward is not None:
                            backward()
                    except (KeyError, ValueError):
                        # A size of another form of the op, which its launchers do not take.
                        pass
                found |= {warmup.kernel_of(launch): None for launch in launches}
    return list(found)


def main() -> int:
    os.nice(5)
    outcome = warmup.compile_ahead(kernels(), warmup.this_target())
    print(f"{outcome.compiled} of {outcome.kernels} kernels compiled in {outcome.seconds:.0f} s", *outcome.failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
