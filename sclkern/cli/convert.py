"""``sclkern convert``: a published checkpoint as a folder for ``SCLModel.from_pretrained``."""

from __future__ import annotations

import argparse

from sclkern.model import SCLModel


def run(options: argparse.Namespace) -> int:
    """Convert and print the size of the model."""
    model = SCLModel.from_reference(options.source, strict=not options.allow_mismatch, image_size=options.image_size)
    model.save_pretrained(options.output)
    print(f"{options.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return 0
