"""Retrieval of the demo's held-out pictures and captions, by the pre-trained model as it is."""

from __future__ import annotations

from pathlib import Path

from examples.demo_tasks.commands import evaluate
from examples.demo_tasks.figures import Figure, recall
from sclkern.data.roots import resolve_root
from sclkern.data.sources.arrow import ArrowPairs, write_pairs


def write(folder: Path) -> Path:
    """Write the demo's test pairs, which pre-training reads neither to train nor to validate.

    Args:
        folder: of the table.

    Returns:
        The folder.
    """
    pairs = ArrowPairs(resolve_root("demo"), ["pairs"], "test")
    captions: list[list[str]] = [[] for _ in range(pairs.num_images)]
    for pair, image in enumerate(pairs.pair_image):
        captions[image].append(pairs.caption(pair))
    folder.mkdir(parents=True, exist_ok=True)
    rows = ({"image": bytes(pairs.image_bytes(image)), "caption": captions[image]} for image in range(pairs.num_images))
    write_pairs(folder / "test.arrow", rows)
    return folder


def run(checkpoint: Path, folder: Path) -> list[Figure]:
    """Evaluate a model on the pairs.

    Args:
        checkpoint: folder of the pre-trained model or its run.
        folder: of everything that is written.

    Returns:
        Recalls; every picture with the same caption is a right answer.
    """
    # One candidate of the ranking head: the figures are the contrast's.
    values = evaluate("image-retrieval", checkpoint, write(folder / "data"), folder / "zero_shot", {"task.rerank": 1})
    return [
        Figure(
            "held-out pairs of the demo",
            "pre-trained",
            f"R@{k}",
            recall(values, "itc", k),
            "chance",
            recall(values, "chance", k),
        )
        for k in (1, 5)
    ]
