"""Trainings of the demo with some keys changed, each in a process of its own, and their logged curves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from sclkern.training.logs import read_metrics

ROOT = Path(__file__).parents[2]


def train(folder: Path, changes: dict[str, Any]) -> None:
    """Train the demo into ``folder``, or go on with the training there; ``changes`` are configuration keys."""
    values = {"run.output_dir": folder, "evaluation.attention_images": 0, **changes}
    config = ["--config", str(ROOT / "configs" / "demo.yaml"), *(f"{key}={value}" for key, value in values.items())]
    subprocess.run([sys.executable, "-m", "sclkern.pretrain", *config, "--resume"], cwd=ROOT, check=True)


def logged(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of a training's log; ``kind`` is "train" or "val"."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]
