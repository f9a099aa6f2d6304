"""The model: encoders, fusion, heads."""

from sclkern.models.config import SCLConfig
from sclkern.models.scl import FusedFeatures, SCLModel
from sclkern.models.vision import VisionFeatures

__all__ = ["FusedFeatures", "SCLConfig", "SCLModel", "VisionFeatures"]
