"""The tasks of this package, each registered by its import."""

from sclkern.tasks import coco, flickr30k, lsmdc, msrvtt, own_retrieval, reasoning, vqav2
from sclkern.tasks.task import TASKS

__all__ = ["TASKS", "coco", "flickr30k", "lsmdc", "msrvtt", "own_retrieval", "reasoning", "vqav2"]
