"""``sclkern export``: the model of a run or a checkpoint, as safetensors or under the published names."""

from __future__ import annotations

import argparse
from pathlib import Path

from sclkern.training.directory import read_newest
from sclkern.training.export import export_model


def run(options: argparse.Namespace) -> int:
    """Export, and print what of which step was written where."""
    saved = read_newest(Path(options.source))
    path = export_model(saved, Path(options.output), options.format)
    print(f"{path}: step {saved.state['step']} of {saved.path}")
    return 0
