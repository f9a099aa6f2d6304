"""Image-caption data: arrow tables, the caption tokenizer, image transforms and batches."""

from __future__ import annotations

from pathlib import Path


def demo_root() -> Path:
    """Folder of the embedded data: ``pairs.arrow`` and ``tokenizer/`` (see its README.md)."""
    return Path(__file__).parent / "demo"


def resolve_root(root: str | Path) -> Path:
    """``root`` as a path; the string ``"demo"`` is the embedded folder (``"./demo"`` is one of your own)."""
    return demo_root() if root == "demo" else Path(root)
