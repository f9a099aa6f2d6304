"""Texts of the data are shown as data, in a line and in Markdown."""

import pytest

from sclkern.data.text import escape_markdown, one_line

# Each with what must be seen of it on one line.
CAPTIONS = {
    "$$ cash $$": None,
    "$_$ a_b %s %(x)s {} \\alpha": None,
    "<b>bold</b> & `code` | [link](http://x)": None,
    "🤖 and 👩\u200d🔬": None,
    "שלום עולם و مرحبا": None,
    "e\u0301 ﷽ ﬁ": None,
    "two\nlines\r\nand\ta tab\u2028end": "two lines and a tab end",
    "nul \0 bell \a": r"nul \x00 bell \x07",
    "\x1b[2Jcleared": r"\x1b[2Jcleared",
    "\u202etxet desrever": r"\u202etxet desrever",
    "half \ud800": r"half \ud800",
    "\ufeffmark": r"\ufeffmark",
    " \t\n": "",
    "": "",
}


@pytest.mark.parametrize(("text", "shown"), CAPTIONS.items())
def test_one_line(text, shown):
    line = one_line(text)
    assert line == (text if shown is None else shown)
    line.encode()
    assert one_line(line) == line


def test_long_texts_are_cut():
    assert one_line("a" * 10_000, 24) == "a" * 23 + "…"
    assert one_line("\0" * 10_000, 24) == (r"\x00" * 6)[:23] + "…"
    assert one_line(" \n" * 10_000 + "a b", 24) == "a b"
    assert one_line("exactly 12 c", 12) == "exactly 12 c" and len(one_line("more than twelve", 12)) == 12


@pytest.mark.parametrize(
    "text", [*CAPTIONS, "- a", "1. a", "# a", "+ a", "> a", "===", "a | b", "![x](y)", "&amp;", "---"]
)
def test_markdown_shows_the_characters(text):
    escaped = escape_markdown(text)
    plain = escaped.replace("\\\\", "\0")
    assert "\n" not in escaped
    # Every character with a meaning stands behind a backslash, and without the backslashes the text is as it was.
    for position, character in enumerate(plain):
        if character in "`*_{}[]<>#|~$&!":
            assert plain[position - 1] == "\\", (character, escaped)
    assert not plain.startswith(("-", "+", "=", "1.", "#"))
    assert plain.replace("\\", "").replace("\0", "\\") == one_line(text)
