"""COCO: retrieval of 5,000 pictures and their 25,010 captions, in Karpathy's splits."""

from sclkern.tasks.ranking import CaptionRetrieval
from sclkern.tasks.task import Recipes, register_task

SPLITS = {split: (f"coco_caption_karpathy_{split}",) for split in ("train", "restval", "val", "test")}
_OPTIMIZER = {"learning_rate": 5e-6, "head_factor": 5.0, "fusion_factor": 5.0, "warmup": 0.1}
_DATA = {
    "train_tables": [*SPLITS["train"], *SPLITS["restval"]],
    "transform": "clip_randaug",
}
_TASK = {"epochs": 10.0, "global_batch": 512}
RECIPES: Recipes = {
    "default": {
        "data": {**_DATA, "val_tables": list(SPLITS["val"])},
        "optimizer": _OPTIMIZER,
        "run": {"output_dir": "runs/coco"},
        "task": {**_TASK, "rerank": 256},
    },
    # The published code selects by the test split, and ranks every pair.
    "published": {
        "model": {"image_size": 384},
        "data": {**_DATA, "val_tables": list(SPLITS["test"]), "decoding": "published"},
        "optimizer": {**_OPTIMIZER, "no_decay": "published"},
        "run": {"output_dir": "runs/coco_published"},
        "task": {**_TASK, "rerank": None},
    },
}


@register_task
class Coco(CaptionRetrieval):
    """Retrieval on COCO."""

    name = "coco"
    title = "image-text retrieval (COCO)"
    splits = SPLITS
    recipes = RECIPES
