"""Texts of the data in messages, titles and reports: shown as they are, on one line, never obeyed."""

from __future__ import annotations

import re

# Joiners of emoji and of Persian and Indic letters; Python calls them unprintable.
_JOINERS = "\u200c\u200d"


def one_line(text: str, limit: int | None = None) -> str:
    """A text of the data on one line.

    White space becomes one space; what cannot be printed, such as NUL, an escape sequence of a terminal or a switch of
    the writing direction, becomes an escape such as ``\\x00``.

    Args:
        text: any text.
        limit: characters at most; a longer text ends with "…". None keeps all.

    Returns:
        The line.
    """
    if limit is not None:
        # A caption may be a book; what follows this cannot be shown.
        text = text.lstrip()[: 64 * limit]
    line = "".join(
        c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in " ".join(text.split())
    )
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def escape_markdown(text: str) -> str:
    """A text of the data for a line or a table cell of Markdown: every character is shown, none formats."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~$&!]|:(?=//))", r"\\\1", one_line(text))
    # At the start of a line these begin a list or a rule.
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escaped)
