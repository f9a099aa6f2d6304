"""Swapping the fused ops into a model somebody else made: ``sclkern.fuse``.

Not named after the function: a subpackage ``sclkern.fuse`` would take its place in ``sclkern``.
"""

from sclkern.integrations.fuse.report import FuseReport, Left, Replaced, fuse

__all__ = ["FuseReport", "Left", "Replaced", "fuse"]
