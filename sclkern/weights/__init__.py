"""Weights: reading them safely, converting names, loading and saving models."""

from sclkern.weights.loading import LoadReport
from sclkern.weights.names import split_to_reference
from sclkern.weights.pretrained import from_pretrained, save_pretrained
from sclkern.weights.reference import from_reference, load_reference, to_reference

__all__ = [
    "LoadReport",
    "from_pretrained",
    "from_reference",
    "load_reference",
    "save_pretrained",
    "split_to_reference",
    "to_reference",
]
