"""What each part of the method does for the demo: objectives and ITM negatives changed one at a time, with some seeds.

`python -m benchmarks.training.ablations` trains (about 75 minutes on two idle cores), and appends a record for each
variant. A training that ended is not repeated, so the command may be stopped and given again.
`sclkern bench report` writes the tables and the plot from the records.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.training.demo_runs import ROOT, logged, train
from sclkern import SCLModel
from sclkern.data import open_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.evaluation.retrieval import evaluate_retrieval
from sclkern.tools.bench import records

# By the name in the record; the same steps, batches and learning rates for all.
VARIANTS = {
    "without MVSC and MLSC": {"objectives.recipe": "[itc,itm,mlm]"},
    "scl": {},
    "glscl": {"objectives.recipe": "glscl", "model.patch_mask_token": True},
    "scl, hard negatives": {"objectives.itm_negatives": "hard"},
    "scl, dataset negatives": {"objectives.itm_negatives": "dataset"},
}
VALIDATIONS = 8
# Candidates of ITC that ITM orders, as in the demo, and images that the trained models retrieve from.
RERANKED = 8
SETS = {"held-out": ("val", None), "training": ("train", 300)}


def changes(variant: str, seed: int, steps: int) -> dict[str, object]:
    """Keys of the configuration of a training."""
    return {
        **VARIANTS[variant], "run.seed": seed, "run.max_steps": steps, "run.val_every": max(1, steps // VALIDATIONS),
        "run.save_every": steps,
    }  # fmt: skip


def final_recalls(folder: Path) -> dict[str, dict[str, float]]:
    """Retrieval by the model of a training that has ended, from images that it has seen and others.

    Args:
        folder: of the training.

    Returns:
        Recalls by the name of the set. Those at ``RERANKED`` are of both orders: ITM changes the order up to there.
    """
    model, tokenizer = SCLModel.from_pretrained(folder / "model"), CaptionTokenizer.from_pretrained("demo")
    transform = build_transform("clip_test", model.config.image_size)
    recalls = {}
    for name, (split, images) in SETS.items():
        pairs = open_pairs("demo", ["pairs"], split=split)
        result = evaluate_retrieval(
            model, pairs, tokenizer, transform, rerank=RERANKED, ks=(RERANKED,), max_images=images
        )
        recalls[name] = result.recalls
    return recalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations", help="folder of the trainings")
    options = parser.parse_args()
    folders: dict[str, list[Path]] = {variant: [] for variant in VARIANTS}
    # Seed by seed, so that a stopped series has as many seeds of each variant.
    for seed in range(options.seeds):
        for variant, done in folders.items():
            folder = options.runs / f"{variant.replace(',', '').replace(' ', '_')}_{seed}"
            train(folder, changes(variant, seed, options.steps))
            done.append(folder)
    for variant, done in folders.items():
        curves = [logged(folder, "val") for folder in done]
        ended = [logged(folder, "train")[-1] for folder in done]
        records.append(
            f"training/demo/ablation/{variant}",
            steps=options.steps,
            changes=VARIANTS[variant],
            curves=curves,
            end=ended,
            reranked=RERANKED,
            final=[final_recalls(folder) for folder in done],
        )


if __name__ == "__main__":
    main()
