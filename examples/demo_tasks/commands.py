"""The command line of sclkern, as a user would call it, and what it found."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
# Of a model of 2.8 M parameters on two cores: pictures as they are, and higher rates than the recipes have.
SHORT = {
    "data.transform": "clip_test",
    "optimizer.weight_decay": 0.05,
    "optimizer.max_grad_norm": 5.0,
    "run.log_every": 10,
    "task.epochs": None,
    "task.val_epochs": None,
    "task.global_batch": None,
}


def finetune(task: str, checkpoint: Path, data: Path, folder: Path, keys: Mapping[str, Any]) -> Path:
    """Fine-tune a checkpoint, or go on with it after an interruption.

    Args:
        task: of ``sclkern finetune``.
        checkpoint: folder of the pre-trained model or its run.
        data: folder of the tables.
        folder: of the run.
        keys: of the configuration, over ``SHORT``.

    Returns:
        The folder.
    """
    values = {**SHORT, "data.root": data, "run.output_dir": folder, **keys}
    overrides = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    _sclkern("finetune", task, "--checkpoint", checkpoint, "--resume", *overrides)
    return folder


def pretrain(checkpoint: Path, data: Path, folder: Path, keys: Mapping[str, Any]) -> Path:
    """Go on with the pre-training of a checkpoint on other data, or with this after an interruption.

    Args:
        checkpoint: folder of the pre-trained model or its run.
        data: folder of the tables ``train`` and ``val``.
        folder: of the run.
        keys: of the configuration, over those of the demo.

    Returns:
        The folder.
    """
    model = checkpoint / "model" if (checkpoint / "model").is_dir() else checkpoint
    values = {
        "weights.pretrained": model,
        "data.root": data,
        "data.train_tables": "[train]",
        "data.train_split": "null",
        "data.val_tables": "[val]",
        "data.val_split": "null",
        "evaluation.attention_images": 0,
        "evaluation.train_images": 0,
        "run.output_dir": folder,
        **keys,
    }
    overrides = [f"{key}={value}" for key, value in values.items()]
    _sclkern("pretrain", "--config", DEMO, "--resume", *overrides)
    return folder


def evaluate(
    task: str, checkpoint: Path, data: Path, folder: Path, keys: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Evaluate a model on the split "test".

    Args:
        task: of ``sclkern evaluate``.
        checkpoint: folder of the model or its run.
        data: folder of the tables.
        folder: where ``results.json`` is written.
        keys: of the configuration.

    Returns:
        The metrics.
    """
    overrides = [f"{key}={value}" for key, value in (keys or {}).items()]
    of_model = ("--checkpoint", checkpoint, "--data", data, "--split", "test", "--output", folder)
    _sclkern("evaluate", task, *of_model, *overrides)
    values: dict[str, float] = json.loads((folder / "results.json").read_text())["values"]
    return values


def _sclkern(*arguments: object) -> None:
    shown = shlex.join(["sclkern", *map(str, arguments)])
    print(f"\n{shown}", flush=True)
    subprocess.run([sys.executable, "-m", "sclkern.cli", *map(str, arguments)], check=True)
