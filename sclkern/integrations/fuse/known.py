"""The table of sources that were examined, ``known.json``: what it lacks, and how it is written.

    python -m sclkern.integrations.fuse.known  # what the installed transformers has that the table lacks
    python -m sclkern.integrations.fuse.known --update --transformers transformers-5.*.whl
    python -m sclkern.integrations.fuse.known --add compared transformers.models.vilt.modeling_vilt:ViltSelfAttention

"eager_attention_forward" has the functions of this name, with what they compute, which ``register_attention`` and
``fuse`` read. "compared" has the classes that ``fuse`` takes in the models of tests/swapped_models, as they were when
those were compared with and without the ops; a test fails when an installed one differs. An entry, by digest, has the
``names`` and the ``versions`` in which it was found.

``--update`` adds a class that is in the table already in the form that it has in another version: run
``make test-models`` with that version first. A function that the table lacks is printed, because somebody must read
what it computes. Sources are read and never imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sclkern.integrations.source import KNOWN_FILE, Source

# Sections for every function whose name matches, in whatever modeling file; the others are for classes by name.
FUNCTIONS = {"eager_attention_forward": r"\w*eager_attention_forward"}
# By section, by digest.
Table = dict[str, dict[str, dict[str, Any]]]


class Found(NamedTuple):
    """A definition in some version of transformers.

    Attributes:
        section: of the table.
        name: as "transformers.models.vilt.modeling_vilt:ViltSelfAttention".
        digest: of its source; None where the source says too little (its base class stands in another file).
        version: of transformers.
    """

    section: str
    name: str
    digest: str | None
    version: str


def find(table: Table, package: Any) -> Iterator[Found]:
    """What a transformers package has of the table's names.

    Args:
        table: the table.
        package: folder ``transformers``, as a path on disk or in a wheel.

    Yields:
        Each class of the table and each function of ``FUNCTIONS``.
    """
    lines = (package / "__init__.py").read_text(encoding="utf-8")
    version = next(iter(re.findall(r'^__version__ = "([^"]+)"', lines, re.MULTILINE)), "unknown")
    classes: dict[str, list[tuple[str, str]]] = {}
    for section, entries in table.items():
        for name in {name for entry in entries.values() for name in entry["names"]} if section not in FUNCTIONS else ():
            module, _, cls = name.partition(":")
            classes.setdefault(module, []).append((section, cls))
    for model in sorted(package.joinpath("models").iterdir(), key=lambda folder: folder.name):
        for file in sorted(model.iterdir(), key=lambda file: file.name) if model.is_dir() else ():
            module = f"transformers.models.{model.name}.{file.name.removesuffix('.py')}"
            if not file.name.startswith("modeling_") or not file.name.endswith(".py"):
                continue
            text = file.read_text(encoding="utf-8")
            wanted = classes.get(module, []) + [
                (section, function)
                for section, pattern in FUNCTIONS.items()
                for function in re.findall(rf"^def ({pattern})\(", text, re.MULTILINE)
            ]
            if not wanted:
                continue
            source = Source(text)
            for section, definition in wanted:
                if definition in source.definitions:
                    yield Found(section, f"{module}:{definition}", source.digest(definition), version)


def note(table: Table, found: Found, **more: Any) -> None:
    """Put a definition into the table.

    Args:
        table: the table; it is changed.
        found: the definition; it has a digest.
        **more: what the section says about it, where the table has no such entry yet.
    """
    entry = table.setdefault(found.section, {}).setdefault(found.digest or "", {**more, "names": [], "versions": []})
    entry["names"] = sorted({*entry["names"], found.name})
    entry["versions"] = sorted({*entry["versions"], found.version}, key=_order)
    entry["versions"] = [entry["versions"][0], entry["versions"][-1]]


def main(arguments: list[str] | None = None) -> int:
    """Compare the table with sources of transformers, or write it.

    Args:
        arguments: of the command line.

    Returns:
        1 where the sources have something of the table's names that it lacks, otherwise 0.
    """
    parser = argparse.ArgumentParser(description="What sclkern.fuse knows of the source of transformers.")
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--add", nargs=2, action="append", default=[], metavar=("SECTION", "MODULE:CLASS"))
    parser.add_argument(
        "--transformers", nargs="+", metavar="PATH", help="folders or wheels; default: the installed one"
    )
    options = parser.parse_args(arguments)
    table: Table = json.loads(KNOWN_FILE.read_text())
    # Entries that only hold names, until their sources are read.
    for section, name in options.add:
        table.setdefault(section, {}).setdefault("", {"names": [], "versions": []})["names"].append(name)
    before = {section: set(entries) for section, entries in table.items()}
    lacking: dict[tuple[str, str | None], list[Found]] = {}
    for path in options.transformers or [installed()]:
        package = zipfile.Path(path, "transformers/") if str(path).endswith(".whl") else Path(path)
        for found in find(table, package):
            if found.digest in before.get(found.section, ()):
                note(table, found)
            else:
                lacking.setdefault((found.section, found.digest), []).append(found)
                if found.section not in FUNCTIONS and found.digest is not None:
                    note(table, found)
    for (section, digest), places in lacking.items():
        names, versions = (
            sorted({place.name for place in places}),
            sorted({place.version for place in places}, key=_order),
        )
        print(f"{section} {digest}: {names[0]} and {len(names) - 1} more in {versions[0]} to {versions[-1]}")
    if options.update or options.add:
        for entries in table.values():
            entries.pop("", None)
        KNOWN_FILE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return int(bool(lacking))


def installed() -> Path:
    """The folder of the installed transformers.

    Returns:
        Its path.

    Raises:
        SystemExit: transformers is not installed.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise SystemExit("transformers: not installed; pip install 'transformers>=5', or give --transformers PATH")
    return Path(spec.origin).parent


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


if __name__ == "__main__":
    sys.exit(main())
