"""A GPU that is none, so that everything that runs on one runs without it: ``make gpu``, profiles, trainings.

``install`` makes torch see an H200. What is put on it stays in memory of the CPU, and every tensor says that it is on
the GPU. Ops take their kernels: the launch is prepared as on a GPU, and the definition computes the result. Events,
streams, memory and properties have plausible values; a CUDA graph records operations and runs them again at a replay,
and a capture fails where it would on a GPU: where a value is read.

What it cannot show: numbers of kernels, times, and what CUDA refuses for other reasons.

``environment`` is that of a process, and of all that it starts, in which ``site/sitecustomize.py`` installs the stub
before anything else is imported.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

VARIABLE = "SCLKERN_STUB_GPU"
ROOT = Path(__file__).parents[3]
NAME = "NVIDIA H200"


def environment() -> dict[str, str]:
    """Environment variables of a process in which torch sees the stub."""
    helpers = Path(__file__).parents[1]
    folders = [str(Path(__file__).parent / "site"), str(helpers), str(ROOT)]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, VARIABLE: "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def install() -> None:
    """Make torch see a GPU in this process, for good."""
    # One after the other: what a module finds while it is imported is what it keeps.
    for part in ("cuda", "redirect", "launches", "sizes"):
        importlib.import_module(f"stub_gpu.{part}").install()
