"""Retrieval of clips by captions, by the pre-trained model as it is: animated emoji of animals, vehicles and things."""

from __future__ import annotations

from pathlib import Path

from examples.demo_tasks.commands import evaluate
from examples.demo_tasks.figures import Figure, recall

DATA = Path(__file__).parents[1] / "data" / "animated_emoji"
FRAMES = 4
# One candidate of the ranking head: the figures are the contrast's.
KEYS = {"data.num_frames": FRAMES, "task.rerank": 1}


def run(checkpoint: Path, folder: Path) -> list[Figure]:
    """Evaluate a model on the clips.

    Args:
        checkpoint: folder of the pre-trained model or its run.
        folder: of everything that is written.

    Returns:
        Recalls of the contrast.
    """
    values = evaluate("video-retrieval", checkpoint, DATA, folder / "zero_shot", KEYS)
    model = f"pre-trained on pictures, {FRAMES} frames"
    return [
        Figure(
            "clips of animated emoji", model, f"R@{k}", recall(values, "itc", k), "chance", recall(values, "chance", k)
        )
        for k in (1, 5)
    ]
