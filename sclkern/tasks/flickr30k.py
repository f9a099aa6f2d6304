"""Flickr30K: retrieval of 1,000 pictures and their 5,000 captions, in Karpathy's splits."""

from sclkern.tasks.ranking import CaptionRetrieval
from sclkern.tasks.task import Recipes, register_task

SPLITS = {split: (f"f30k_caption_karpathy_{split}",) for split in ("train", "val", "test")}
_OPTIMIZER = {"learning_rate": 5e-6, "head_factor": 10.0, "fusion_factor": 10.0, "warmup": 0.1}
_DATA = {"transform": "clip_randaug"}
_TASK = {"epochs": 10.0, "global_batch": 512}
RECIPES: Recipes = {
    "default": {
        "data": {**_DATA, "train_tables": list(SPLITS["train"]), "val_tables": list(SPLITS["val"])},
        "optimizer": _OPTIMIZER,
        "run": {"output_dir": "runs/flickr30k"},
        "task": {**_TASK, "rerank": 128},
    },
    # The published code trains on the validation split, selects by the test split, and ranks every pair.
    "published": {
        "model": {"image_size": 384},
        "data": {
            **_DATA,
            "train_tables": [*SPLITS["train"], *SPLITS["val"]],
            "val_tables": list(SPLITS["test"]),
            "decoding": "published",
        },
        "optimizer": {**_OPTIMIZER, "no_decay": "published"},
        "run": {"output_dir": "runs/flickr30k_published", "seed": 1919},
        "task": {**_TASK, "rerank": None},
    },
}


@register_task
class Flickr30k(CaptionRetrieval):
    """Retrieval on Flickr30K."""

    name = "flickr30k"
    title = "image-text retrieval (Flickr30K)"
    splits = SPLITS
    recipes = RECIPES
