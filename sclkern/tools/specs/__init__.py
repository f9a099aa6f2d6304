"""One ``OpSpec`` an op, the only statement of its inputs: tests, benchmarks, tuning and static checks read ``SPECS``.

Every module of this package whose name has no leading underscore describes the op of that name in its ``SPEC``.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from sclkern.tools.specs._spec import PASSES, AccuracyShape, Backward, Cost, Inputs, OpSpec, Size, Values
from sclkern.tools.specs._workload import captions

SPECS: dict[str, OpSpec] = {
    module.name: import_module(f"{__name__}.{module.name}").SPEC
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}

__all__ = [
    "PASSES",
    "SPECS",
    "AccuracyShape",
    "Backward",
    "Cost",
    "Inputs",
    "OpSpec",
    "Size",
    "Values",
    "captions",
]
