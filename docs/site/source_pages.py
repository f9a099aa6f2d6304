"""Sphinx: a link from a page to a file or folder of the repository leads to a page that shows it.

On a checkout such links work as they stand, but a site has none of these files. A link to what does not exist stays,
and Sphinx warns of it.
"""

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
# Of longer files, such as records of benchmarks, a page shows the beginning.
LONGEST = 100_000
# Files and folders, relative to the root, that a page of this build leads to. Builds are never incremental.
shown: set[Path] = set()


def show(path: Path) -> str:
    """The address of the page that shows a file or folder, relative to the root of the site."""
    name = path.relative_to(ROOT)
    if name not in shown:
        shown.add(name)
        for entry in entries(path):
            show(entry)
    return f"source/{name.as_posix()}.html"


def entries(path: Path) -> list[Path]:
    hidden = (".", "__pycache__")
    return sorted(e for e in path.iterdir() if not e.name.startswith(hidden)) if path.is_dir() else []


class SourceLinks(SphinxTransform):
    # Before Sphinx copies such files for downloading.
    default_priority = 400

    def apply(self, **kwargs) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        links = [*self.document.findall(addnodes.download_reference), *self.document.findall(addnodes.pending_xref)]
        for link in links:
            target = link["reftarget"]
            if link.get("refdomain") == "doc":  # Markdown, be it a page of the site or not
                path = ROOT / f"{target}.md" if target not in self.env.found_docs else ROOT
            else:
                path = Path(os.path.normpath(folder / target.partition("#")[0]))
            if link.get("reftype") == "myst" and path.exists() and ROOT in path.parents:
                address = os.path.relpath(ROOT / show(path), folder)
                link.replace_self(nodes.reference("", "", *link.children, internal=True, refuri=address))


def pages(app) -> Iterator[tuple[str, dict[str, str], str]]:
    for name in sorted(shown):
        path, title = ROOT / name, escape(str(name))
        names = [escape(entry.name) for entry in entries(path)]
        listed = "".join(f'<li><a href="{path.name}/{entry}.html">{entry}</a></li>' for entry in names)
        body = f"<ul>{listed}</ul>" if path.is_dir() else highlighted(path)
        yield f"source/{name.as_posix()}", {"title": title, "body": f"<h1>{title}</h1>{body}"}, "page.html"


def highlighted(path: Path) -> str:
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return f"<p>{path.stat().st_size:,} bytes, not text.</p>"
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    code = highlight(text[:LONGEST], lexer, HtmlFormatter(lineanchors="L"))
    return code if len(text) <= LONGEST else f"<p>The first {LONGEST:,} of {len(text):,} characters.</p>{code}"


def setup(app) -> None:
    app.add_transform(SourceLinks)
    app.connect("html-collect-pages", pages)
