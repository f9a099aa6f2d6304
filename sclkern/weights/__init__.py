"""Weights: reading them safely, converting names, filling networks and saving them."""

from sclkern.weights.loading import LoadReport
from sclkern.weights.names import split_to_reference
from sclkern.weights.pretrained import from_pretrained, save_pretrained
from sclkern.weights.reference import from_reference, to_reference

__all__ = [
    "LoadReport",
    "from_pretrained",
    "from_reference",
    "save_pretrained",
    "split_to_reference",
    "to_reference",
]
