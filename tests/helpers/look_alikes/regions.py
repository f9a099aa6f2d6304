"""ALIGN-BENCH: pictures with the regions of words."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from look_alikes.tree import Tree, caption, write, write_picture


def align_bench(root: Path, *, count: int = 4) -> Tree:
    """ALIGN-BENCH: images/<i>.jpg, pkls/<i>.pkl."""
    tree = Tree(root)
    for number in range(count):
        write_picture(root / "images" / f"{number}.jpg", number)
        text = caption(number)
        regions: dict[str, list[dict[str, Any]]] = {}
        for place, word in enumerate(dict.fromkeys(text.split()[:2])):
            mask = np.zeros((64, 80), dtype=bool)
            mask[4 : 20 + place, 8:40] = True
            regions[word] = [{"bbox_mask": [8, 4, 40, 20 + place], "pixel_mask": mask}]
        write(root / "pkls" / f"{number}.pkl", pickle.dumps({"caption": text, "annotation": regions}))
        tree.row("align_bench", file=f"images/{number}.jpg", caption=[text], image_id=str(number), regions=regions)
    return tree
