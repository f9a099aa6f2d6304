"""The table of sources that were examined, ``known.json``: what it lacks, and how it is written.

    python -m sclkern.integrations.fuse.known  # what the installed transformers and timm have that the table lacks
    python -m sclkern.integrations.fuse.known --update --transformers transformers-5.*.whl --timm timm-1.*.whl
    python -m sclkern.integrations.fuse.known --add compared transformers.models.vilt.modeling_vilt:ViltSelfAttention

"eager_attention_forward" has the functions of this name, with what they compute, which ``register_attention`` and
``fuse`` read. "compared" has the classes that ``fuse`` takes in the models of tests/swapped_models, as they were when
those were compared with and without the ops; a test fails when an installed one differs. "forwards" has texts of
forwards, each with the ``form`` of what it does with the module's children (``vit``, ``blocks`` and
``huggingface.packed`` read it), whatever class it stands in; "norms" has classes that are torch's LayerNorm or RMSNorm.
An entry, by digest, has the ``names`` and the ``versions`` in which it was found.

``--update`` adds a class that is in the table already in the form that it has in another version: run
``make test-models`` with that version first. A function, a forward or a norm that the table lacks is printed, because
somebody must read what it computes; then its digest is put into the table by hand, a forward's with its form, and
``--update`` finds the names and the versions. Sources are read and never imported.
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
# Sections whose entries somebody has read; an unknown one is never added by itself.
EXAMINED = (*FUNCTIONS, "forwards", "norms")
# Where transformers and timm define modules.
_FILES = {"transformers": r"models/\w+/modeling_\w+\.py", "timm": r"(models|layers)/\w+\.py"}
# By section, by digest.
Table = dict[str, dict[str, dict[str, Any]]]


class Found(NamedTuple):
    """A definition in some version of transformers or timm.

    Attributes:
        section: of the table.
        name: as "transformers.models.vilt.modeling_vilt:ViltSelfAttention".
        digest: of its source; None where the source says too little (its base class stands in another file).
        version: of the package, such as "5.24.0", "timm 1.0.31".
    """

    section: str
    name: str
    digest: str | None
    version: str


def find(table: Table, package: Any, root: str = "transformers", everywhere: bool = False) -> Iterator[Found]:
    """What a package has of the table's names.

    Args:
        table: the table.
        package: its folder, as a path on disk or in a wheel.
        root: its name, "transformers" or "timm".
        everywhere: find the texts of "forwards" in classes that the table does not name, too; takes a minute.

    Yields:
        Each class of the table and each function of ``FUNCTIONS``.
    """
    version = _version(package, root)
    classes: dict[str, list[tuple[str, str]]] = {}
    for section, entries in table.items():
        for name in {name for entry in entries.values() for name in entry["names"]} if section not in FUNCTIONS else ():
            module, _, cls = name.partition(":")
            classes.setdefault(module, []).append((section, cls))
    for path, file in sorted(_files(package, "")):
        if not re.fullmatch(_FILES[root], path):
            continue
        module = ".".join([root, *path.removesuffix(".py").split("/")])
        text = file.read_text(encoding="utf-8")
        wanted = classes.get(module, []) + [
            (section, function)
            for section, pattern in FUNCTIONS.items()
            for function in re.findall(rf"^def ({pattern})\(", text, re.MULTILINE)
            if root == "transformers"
        ]
        if everywhere and "norm" in text:
            named = {cls for section, cls in wanted if section == "forwards"}
            others = {*re.findall(r"^class (\w+)\(", text, re.MULTILINE)} - named
            wanted += [("forwards", cls) for cls in sorted(others)]
        if not wanted:
            continue
        source = Source(text)
        for section, definition in wanted:
            if definition not in source.definitions:
                continue
            digest = source.forward_digest(definition) if section == "forwards" else source.digest(definition)
            if (
                (section, definition) in classes.get(module, ())
                or section in FUNCTIONS
                or digest in table.get(section, ())
            ):
                yield Found(section, f"{module}:{definition}", digest, version)


def _version(package: Any, root: str) -> str:
    file = package / ("version.py" if root == "timm" else "__init__.py")
    found = re.findall(r"""^__version__ = ["']([^"']+)["']""", file.read_text(encoding="utf-8"), re.MULTILINE)
    return (found or ["unknown"])[0] if root == "transformers" else f"{root} {(found or ['unknown'])[0]}"


def _files(folder: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Files of a folder and of the folders in it, with their paths; only where modules may be."""
    for entry in folder.iterdir():
        inner = f"{path}{entry.name}"
        if entry.is_dir() and re.match(r"(models|layers)\b", inner):
            yield from _files(entry, f"{inner}/")
        elif inner.endswith(".py"):
            yield inner, entry


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
    """Compare the table with sources of transformers and timm, or write it.

    Args:
        arguments: of the command line.

    Returns:
        1 where the sources have something of the table's names that it lacks, otherwise 0. Without paths, the sources
        are those that are installed.
    """
    parser = argparse.ArgumentParser(description="What sclkern.fuse knows of the source of transformers and timm.")
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--add", nargs=2, action="append", default=[], metavar=("SECTION", "MODULE:CLASS"))
    for root in _FILES:
        parser.add_argument(f"--{root}", nargs="+", default=[], metavar="PATH", help="folders or wheels")
    options = parser.parse_args(arguments)
    table: Table = json.loads(KNOWN_FILE.read_text())
    # Entries that only hold names, until their sources are read.
    for section, name in options.add:
        table.setdefault(section, {}).setdefault("", {"names": [], "versions": []})["names"].append(name)
    before = {section: set(entries) for section, entries in table.items()}
    lacking: dict[tuple[str, str | None], list[Found]] = {}
    given = [(root, path) for root in _FILES for path in getattr(options, root)]
    for root, path in given or _all_installed():
        package = zipfile.Path(path, f"{root}/") if str(path).endswith(".whl") else Path(path)
        for found in find(table, package, root, everywhere=options.update):
            if found.digest in before.get(found.section, ()):
                note(table, found)
            else:
                lacking.setdefault((found.section, found.digest), []).append(found)
                if found.section not in EXAMINED and found.digest is not None:
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


def installed(root: str = "transformers") -> Path:
    """The folder of an installed package.

    Args:
        root: its name, "transformers" or "timm".

    Returns:
        Its path.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec(root)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{root}: not installed; pip install {root}, or give --{root} PATH")
    return Path(spec.origin).parent


def _all_installed() -> list[tuple[str, Path]]:
    """transformers, and timm if it is installed."""
    roots = [root for root in _FILES if root == "transformers" or importlib.util.find_spec(root)]
    return [(root, installed(root)) for root in roots]


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


if __name__ == "__main__":
    sys.exit(main())
