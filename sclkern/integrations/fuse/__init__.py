"""Swapping the fused ops into a model from elsewhere: ``sclkern.fuse``.

The function is re-exported from ``sclkern`` itself, which is why this package stands in ``integrations``: a submodule
``sclkern.fuse`` would shadow it.
"""

from sclkern.integrations.fuse.report import FuseReport, Left, Replaced, fuse

__all__ = ["FuseReport", "Left", "Replaced", "fuse"]
