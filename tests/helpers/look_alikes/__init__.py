"""Small trees of the published data sets, laid out as they are distributed, from the embedded pictures.

Each function writes a tree into a folder and returns a ``Tree`` with the rows that a conversion should give.
``defects`` names what is wrong in it, as real sets have it; each defect is at one place that ``Tree.defective`` tells.
"""

from look_alikes.captions import coco, flickr30k, vg
from look_alikes.clips import lsmdc, msrvtt, webvid
from look_alikes.questions import nlvr2, vqav2
from look_alikes.regions import align_bench
from look_alikes.tree import Tree
from look_alikes.web import cc3m, cc12m, img2dataset, sbu

__all__ = [
    "Tree",
    "align_bench",
    "cc3m",
    "cc12m",
    "coco",
    "flickr30k",
    "img2dataset",
    "lsmdc",
    "msrvtt",
    "nlvr2",
    "sbu",
    "vg",
    "vqav2",
    "webvid",
]
