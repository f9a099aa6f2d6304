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


def read_caption(content: bytes | object) -> str:
    """A caption as a data file holds it, without white space around it.

    Args:
        content: bytes of a text file, in UTF-8 with or without a byte order mark, or a value of a table.

    Returns:
        Text that is not blank.

    Raises:
        ValueError: it is no text, or blank. The message is the reason.
    """
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption is not in UTF-8 (byte {error.start})") from error
    if not isinstance(content, str):
        raise ValueError(f"the caption is of type {type(content).__name__}, expected text")
    if "\0" in content:
        raise ValueError("the caption has null bytes, as text in UTF-16 and binary files have")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError("the caption has half a surrogate pair, which is no text")
    if not content.strip():
        raise ValueError("the caption is blank")
    return content.strip()
