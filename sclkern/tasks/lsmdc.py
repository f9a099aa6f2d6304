"""LSMDC: retrieval of clips of films, 1,000 in the public test set.

Frames, rates and the weight of the contrast are those of SCL, which selects by the public test set.
"""

from sclkern.tasks.ranking import ClipRetrieval
from sclkern.tasks.task import Recipes, register_task

SPLITS = {split: (f"lsmdc_{split}",) for split in ("train", "val", "test", "public_test")}
_OPTIMIZER = {"learning_rate": 5e-6, "head_factor": 5.0, "fusion_factor": 5.0, "warmup": 0.05}
_DATA = {
    "train_tables": list(SPLITS["train"]),
    "transform": "clip_randaug",
    "num_frames": 4,
    # Uniform in training too, as the published code reads the frames of a second each.
    "frame_sampling": "uniform",
}
_TASK = {"epochs": 10.0, "global_batch": 256}
RECIPES: Recipes = {
    "default": {
        "data": {**_DATA, "val_tables": list(SPLITS["val"])},
        "optimizer": _OPTIMIZER,
        "run": {"output_dir": "runs/lsmdc"},
        "task": {**_TASK, "rerank": 128},
    },
    "published": {
        "model": {"image_size": 224},
        "data": {**_DATA, "val_tables": list(SPLITS["public_test"]), "decoding": "published"},
        "optimizer": {**_OPTIMIZER, "no_decay": "published"},
        "run": {"output_dir": "runs/lsmdc_published"},
        "task": {**_TASK, "rerank": None},
    },
}


@register_task
class Lsmdc(ClipRetrieval):
    """Retrieval on LSMDC."""

    name = "lsmdc"
    title = "video-text retrieval (LSMDC)"
    splits = SPLITS
    recipes = RECIPES
