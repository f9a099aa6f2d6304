"""``results.json``: the metrics of an evaluation, and what they were measured on and by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sclkern.io import write_atomically
from sclkern.tasks.config import FinetuneConfig
from sclkern.tasks.task import Task, TaskSource

# In place of a recipe: of a model that is not fine-tuned, and of one that does not say how it was.
ZERO_SHOT, UNKNOWN = "zero-shot", "unknown"


def describe(
    task: Task, config: FinetuneConfig, source: TaskSource, tables: Sequence[str], recipe: str
) -> dict[str, Any]:
    """What ``results.json`` says of an evaluation beside its metrics, as plain values.

    Args:
        task: that was evaluated.
        config: of the evaluation, or of the run that made it.
        source: the samples.
        tables: their names.
        recipe: that the model was fine-tuned by, ``ZERO_SHOT`` or ``UNKNOWN``.

    Returns:
        "task", "recipe", "tables", "samples", "images" and the "digest" of the data, "model" (its configuration),
        "rerank" and "precision".
    """
    return {
        "task": task.name,
        "recipe": recipe,
        "tables": list(tables),
        "samples": int(source.num_samples),
        "images": int(source.num_images),
        "digest": source.digest,
        "model": dataclasses.asdict(config.model),
        "rerank": config.task.rerank,
        "precision": config.run.precision,
    }


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def write_results(path: Path, about: Mapping[str, Any], values: Mapping[str, float]) -> None:
    """Write ``results.json``.

    Args:
        path: of the file.
        about: of ``describe``, and what else is known.
        values: the metrics.
    """
    write_json(path, {**about, "values": dict(values)})
