"""Where data lies: the embedded folder, or one of the user's, local or behind a URL."""

from __future__ import annotations

from pathlib import Path

from sclkern.data.names import is_url


def demo_root() -> Path:
    """Folder of the embedded data: ``pairs.arrow`` and ``tokenizer/`` (see its README.md)."""
    return Path(__file__).parent / "demo"


def resolve_root(root: str | Path) -> Path | str:
    """``root`` as a local path, or an fsspec URL as it is.

    Args:
        root: local folder or URL; the string ``"demo"`` is the embedded folder, ``"./demo"`` a folder of the user's.

    Returns:
        What a reader is given, and ``DataFolder`` takes.
    """
    if root == "demo":
        return demo_root()
    return str(root) if is_url(root) else Path(root)
