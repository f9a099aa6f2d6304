"""Whether training by the kernels takes the course of training by their definitions: every loss of every step.

`python -m benchmarks.training.fused_against_eager` trains preset tiny on the demo's data both ways, with dropout, and
appends a record. Without a GPU the kernels are interpreted, and the command takes minutes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks.training.demo_runs import ROOT, logged, train
from sclkern.objectives import ObjectiveConfig
from sclkern.tools.bench import records

# Largest difference of a loss, relative to its value where that is above one.
TOLERANCE = 1e-5
BACKENDS = {"fused": "triton", "eager": "eager"}


def changes(backend: str, steps: int, batch_size: int) -> dict[str, object]:
    """Keys of the configuration of a training."""
    return {
        "run.backend": backend, "run.max_steps": steps, "run.batch_size": batch_size, "run.log_every": 1,
        "run.val_every": 0, "run.save_every": 5, "model.preset": "tiny", "model.dropout": 0.1,
        "model.vocab_size": 2048, "model.mask_id": 2047, "evaluation.rerank": 0, "evaluation.train_images": 0,
        "evaluation.images": 4,
    }  # fmt: skip


def largest_difference(fused: list[dict[str, float]], eager: list[dict[str, float]]) -> float:
    """Over the losses of all steps.

    Args:
        fused: a row of losses a step.
        eager: the same steps.

    Returns:
        Relative to the value where that is above one.
    """
    pairs = [(row[name], of_eager[name]) for row, of_eager in zip(fused, eager, strict=True) for name in row]
    return max(abs(ours - expected) / max(1.0, abs(expected)) for ours, expected in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fused_against_eager")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    names = ("total", *(objective.name for objective in ObjectiveConfig().selected))
    losses: dict[str, list[dict[str, float]]] = {}
    for name, backend in BACKENDS.items():
        train(options.runs / name, changes(backend, options.steps, options.batch_size))
        losses[name] = [{loss: row[loss] for loss in names} for row in logged(options.runs / name, "train")]
    difference = largest_difference(losses["fused"], losses["eager"])
    interpreted = not torch.cuda.is_available()
    records.append(
        "training/tiny/fused_against_eager", steps=options.steps, batch_size=options.batch_size,
        interpreted=interpreted, largest_difference=difference, tolerance=TOLERANCE, losses=losses,
    )  # fmt: skip
    print(f"largest difference over {len(losses['eager'])} steps: {difference:.2g}, tolerance {TOLERANCE:g}")
    if len(losses["eager"]) != options.steps or difference > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
