"""A tiny run over images and clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sclkern.data.sources.arrow import write_pairs
from tiny_run import NO_LAYERS, overrides, rows

CLIPS = {"root": "none", "format": "coloured_clips:ColouredClips"}


def mixed(folder: Path, *, weights: tuple[float, ...] | None = (2, 1, 1), **changes: Any) -> list[str]:
    """A run over two sources of images and one of clips, below ``folder``."""
    folder.mkdir(exist_ok=True)
    write_pairs(folder / "a.arrow", rows(40))
    write_pairs(folder / "b.arrow", rows(30))
    sources: list[dict[str, Any]] = [{"tables": ["a"]}, {"tables": ["b"]}, {**CLIPS, "tables": ["24"]}]
    if weights:
        sources = [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=False)]
    held_out = [{"tables": ["a"]}, {**CLIPS, "tables": ["10"]}]
    values = {"model__max_frames": 4, "data__num_frames": 3, "data__root": folder, "data__sources": json.dumps(sources)}
    return overrides(folder / "run", **{**NO_LAYERS, **values, "data__val_sources": json.dumps(held_out), **changes})
