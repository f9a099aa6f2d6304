"""Image-caption data: sources of pairs, the caption tokenizer, image transforms and batches."""

from sclkern.data import sources
from sclkern.data.roots import demo_root, resolve_root
from sclkern.data.source import SOURCES, PairSource, image_ids, index_captions, open_pairs, register_source

__all__ = [
    "SOURCES",
    "PairSource",
    "demo_root",
    "image_ids",
    "index_captions",
    "open_pairs",
    "register_source",
    "resolve_root",
    "sources",
]
