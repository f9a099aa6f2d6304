"""``sclkern/ops`` stays small: what an op needs beyond its launchers is written once."""

import ast
import io
import tokenize
from pathlib import Path

import sclkern

FOLDER = Path(sclkern.__file__).parent / "ops"
MAX_LINES = 1990
QUOTES = 3 * chr(34)
MARKS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def lines_of_code(text: str) -> int:
    """Lines with code on them; docstrings, comments and blank lines do not count."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in MARKS | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_counting():
    text = "\n".join([QUOTES + "A module." + QUOTES, "", "# A comment.", "def f(", "    x,  # code", "):"])
    text += "\n".join(
        ["", "    " + QUOTES + "Two", "    lines." + QUOTES, "    return " + QUOTES + "a", "b" + QUOTES, ""]
    )
    assert lines_of_code(text) == 5


def test_the_ops_stay_small():
    sizes = {file.name: lines_of_code(file.read_text()) for file in sorted(FOLDER.glob("*.py"))}
    assert sum(sizes.values()) <= MAX_LINES, sizes
