"""Retrieval on pictures or clips of one's own: the tables ``train``, ``val`` and ``test`` of a folder."""

from sclkern.tasks.ranking import CaptionRetrieval, ClipRetrieval
from sclkern.tasks.task import Recipes, register_task

SPLITS = {split: (split,) for split in ("train", "val", "test")}
_OPTIMIZER = {"learning_rate": 5e-6, "head_factor": 5.0, "fusion_factor": 5.0, "warmup": 0.1}
_DATA = {
    "train_tables": list(SPLITS["train"]),
    "val_tables": list(SPLITS["val"]),
    "transform": "clip_randaug",
}


def _recipes(name: str, **data: object) -> Recipes:
    """The recipe of COCO, with nothing that is COCO's own."""
    return {
        "default": {
            "data": {**_DATA, **data},
            "optimizer": _OPTIMIZER,
            "run": {"output_dir": f"runs/{name}"},
            "task": {"epochs": 10.0, "global_batch": 256, "rerank": 128},
        }
    }


@register_task
class ImageRetrieval(CaptionRetrieval):
    """Retrieval on a folder of pictures."""

    name = "image-retrieval"
    title = "image-text retrieval"
    splits = SPLITS
    recipes = _recipes("image_retrieval")


@register_task
class VideoRetrieval(ClipRetrieval):
    """Retrieval on a folder of clips."""

    name = "video-retrieval"
    title = "video-text retrieval"
    splits = SPLITS
    recipes = _recipes("video_retrieval", num_frames=4)
