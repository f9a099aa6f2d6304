"""Where data lies: the embedded folder, or one of the user's."""

from __future__ import annotations

from pathlib import Path


def demo_root() -> Path:
    """Folder of the embedded data: ``pairs.arrow`` and ``tokenizer/`` (see its README.md)."""
    return Path(__file__).parent / "demo"


def resolve_root(root: str | Path) -> Path:
    """``root`` as a path; the string ``"demo"`` is the embedded folder, ``"./demo"`` a folder of the user's."""
    return demo_root() if root == "demo" else Path(root)
