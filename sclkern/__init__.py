"""sclkern: vision-language pre-training with Semantic Completion Learning (arXiv 2211.13437), made fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sclkern import nn as nn
    from sclkern import ops as ops
    from sclkern.errors import UserError as UserError
    from sclkern.integrations.fuse import FuseReport as FuseReport
    from sclkern.integrations.fuse import fuse as fuse
    from sclkern.integrations.huggingface import register_attention as register_attention
    from sclkern.model import SCLModel as SCLModel
    from sclkern.models import SCLConfig as SCLConfig
    from sclkern.objectives import ObjectiveConfig as ObjectiveConfig
    from sclkern.step import SCLLosses as SCLLosses

__version__ = "0.1.0"

# Resolved on first use, so that `import sclkern` costs milliseconds and loads no torch.
_EXPORTS = {
    "SCLModel": "sclkern.model",
    "SCLConfig": "sclkern.models",
    "SCLLosses": "sclkern.step",
    "ObjectiveConfig": "sclkern.objectives",
    "UserError": "sclkern.errors",
    "FuseReport": "sclkern.integrations.fuse",
    "fuse": "sclkern.integrations.fuse",
    "register_attention": "sclkern.integrations.huggingface",
}
_SUBPACKAGES = ("nn", "ops")
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"sclkern.{name}")
    raise AttributeError(f"module 'sclkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBPACKAGES})
