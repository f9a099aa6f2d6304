"""The network: encoders, fusion encoder, heads."""

from sclkern.models.config import SCLConfig
from sclkern.models.network import FusedFeatures, SCLNetwork
from sclkern.models.vision import VisionFeatures

__all__ = ["FusedFeatures", "SCLConfig", "SCLNetwork", "VisionFeatures"]
