"""Retrieval of clips by captions: animated emoji of animals, vehicles and things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.demo_tasks.commands import evaluate, finetune
from examples.demo_tasks.figures import Figure, recall

DATA = Path(__file__).parents[1] / "data" / "animated_emoji"
TASK = "clips of animated emoji"
KEYS: dict[str, Any] = {
    "data.num_frames": 4,
    "optimizer.fusion_factor": 1.0,
    "optimizer.head_factor": 1.0,
    "optimizer.learning_rate": 3e-4,
    "run.batch_size": 8,
    "run.max_steps": 60,
    "run.val_every": 20,
    "task.rerank": 16,
}


def run(checkpoint: Path, folder: Path) -> list[Figure]:
    """Evaluate a model on the clips as it is, then fine-tune it on others and evaluate it again.

    Args:
        checkpoint: folder of the pre-trained model or its run.
        folder: of everything that is written.

    Returns:
        Recalls of the contrast among the clips of the test split.
    """
    figures = []
    tuned = finetune("video-retrieval", checkpoint, DATA, folder / "fine_tuned", KEYS)
    for model, of_model in {"pre-trained": checkpoint, "fine-tuned": tuned}.items():
        values = evaluate("video-retrieval", of_model, DATA, folder / model)
        figures += [
            Figure(TASK, model, f"R@{k}", recall(values, "itc", k), "chance", recall(values, "chance", k))
            for k in (1, 5)
        ]
    return figures
