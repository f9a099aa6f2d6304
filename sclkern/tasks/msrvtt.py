"""MSRVTT: retrieval of the 1,000 clips of the split 1k-A, which has no validation split.

The published code has no recipe for it; this one has LSMDC's rates. Nothing is selected: the test split is measured
once, when training has ended.
"""

from sclkern.tasks.ranking import ClipRetrieval
from sclkern.tasks.task import Recipes, register_task

SPLITS = {split: (f"msrvtt_{split}",) for split in ("train", "test")}
RECIPES: Recipes = {
    "default": {
        "data": {
            "train_tables": list(SPLITS["train"]),
            "val_tables": list(SPLITS["test"]),
            "transform": "clip_randaug",
            "num_frames": 4,
        },
        "optimizer": {"learning_rate": 5e-6, "head_factor": 5.0, "fusion_factor": 5.0, "warmup": 0.05},
        "run": {"output_dir": "runs/msrvtt", "val_every": 0},
        "task": {"epochs": 10.0, "val_epochs": None, "global_batch": 256, "rerank": 128},
    },
}


@register_task
class Msrvtt(ClipRetrieval):
    """Retrieval on MSRVTT."""

    name = "msrvtt"
    title = "video-text retrieval (MSRVTT 1k-A)"
    splits = SPLITS
    recipes = RECIPES
