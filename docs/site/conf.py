"""Settings of Sphinx for the site that `make docs` builds in build/docs.

The root of the repository is the source folder, so that the pages are taken where they stand and their links, which
work on a checkout, work on the site.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from pygments.lexers import TextLexer  # noqa: E402
from source_pages import show  # noqa: E402

project = "sclkern"
copyright = "2026, the sclkern authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode", "source_pages"]
root_doc = "README"
include_patterns = ["*.md", "*/README.md", "docs/*.md", "docs/report/*.md", "docs/api/*.rst"]
exclude_patterns = [".*", "*.egg-info", "build", "runs", "sclkern", "configs", "tests", "benchmarks/*/**"]

# Links to headings as on GitHub.
myst_heading_anchors = 4
# A page that docs/README.md does not list is reached by links alone; results begin with headings of the third level.
suppress_warnings = ["toc.not_included", "myst.header"]
# Blocks without a language are commands and what they print.
highlight_language = "text"

html_theme = "furo"
html_title = "sclkern"
html_copy_source = False
# Search engines and bookmarks expect index.html; the first page is README.html.
html_extra_path = ["static"]

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100
napoleon_use_ivar = True


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The place in a source page where an object of the reference is defined; every page of it is in docs/api."""
    found = importlib.import_module(info["module"])
    for part in info["fullname"].split("."):
        found = getattr(found, part, None)
    try:
        found = inspect.unwrap(found)
        file, line = inspect.getsourcefile(found), inspect.getsourcelines(found)[1]
    except (TypeError, OSError):
        return None
    file = Path(file).resolve()
    return f"../../{show(file)}#L-{line}" if file.is_relative_to(ROOT) else None


def contents(app, docname: str, text: list[str]) -> None:
    """The list of docs/README.md is the site's navigation, so that there is one list."""
    if not re.search(r"^# |^===", text[0], re.M):  # the report, which is tables alone
        text[0] = f"# {docname.rpartition('/')[2].capitalize()}\n\n{text[0]}"
    if docname != root_doc:
        return
    page = (ROOT / "docs" / "README.md").read_text()
    text[0] += "\n```{toctree}\n:hidden:\n\nAll pages <docs/README.md>\n```\n"
    for caption, section in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        entries = re.findall(r"^- \[(.+?)\]\((\S+?\.md)\)", section, re.M)
        lines = [f"{title} <{(ROOT / 'docs' / target).resolve().relative_to(ROOT)}>" for title, target in entries]
        text[0] += "\n".join(["", "", "```{toctree}", ":hidden:", f":caption: {caption}", "", *lines, "```", ""])
    text[0] += "\n```{toctree}\n:hidden:\n:caption: Reference\n\ndocs/api/index\n```\n"


def untyped_returns(app, what: str, name: str, found: object, options, lines: list[str]) -> None:
    """Keep Napoleon from reading a type before the first colon of Returns: types stand in the signatures."""
    for i, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            text = lines[i + 1].lstrip()
            lines[i + 1] = lines[i + 1][: -len(text)] + ": " + text


def setup(app) -> None:
    app.add_lexer("layers", TextLexer)  # the diagram of CONTRIBUTING
    app.connect("source-read", contents)
    app.connect("autodoc-process-docstring", untyped_returns, priority=400)
