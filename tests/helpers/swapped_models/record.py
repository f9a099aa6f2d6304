"""The record of what is taken, what is left and why, and the page that is written from it.

``make record-models`` examines every model, writes the record and the list in docs/swapping_in.md; it ends with an
error if any model has a fault. With names of models, only those entries are written anew. ``--oldest`` writes, in the
environment of ``make test-oldest``, which models the oldest transformers cannot build.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
FILE = ROOT / "tests" / "swapped_models" / "record.json"
PAGE = ROOT / "docs" / "swapping_in.md"
BEGIN, END = "<!-- record: begin -->\n", "<!-- record: end -->\n"


def load() -> dict[str, Any]:
    """The record: "transformers", the version it was made with, and "models", an entry for each."""
    record: dict[str, Any] = json.loads(FILE.read_text())
    return record


def save(record: dict[str, Any]) -> None:
    """Write the record, a line for each field of a model."""
    models = []
    for name, entry in record["models"].items():
        fields = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
        models.append(f"  {json.dumps(name)}: {{\n{fields}\n  }}")
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key != "models"]
    FILE.write_text("{\n" + ",\n".join([*head, ' "models": {\n' + ",\n".join(models) + "\n }"]) + "\n}\n")


def section(record: dict[str, Any]) -> str:
    """The list in docs/swapping_in.md.

    Args:
        record: the record of all models.

    Returns:
        Markdown between the two marks of the page.
    """
    taken: dict[str, set[str]] = collections.defaultdict(set)
    left: dict[str, set[str]] = collections.defaultdict(set)
    refused: dict[str, set[str]] = collections.defaultdict(set)
    nothing, idle = set(), set()
    for name, entry in record["models"].items():
        for groups, kind in ((taken, "taken"), (left, "left")):
            for cls, reasons in entry[kind].items():
                for reason in reasons:
                    groups[reason].add(cls)
        idle |= {f"{cls} in {name}" for cls in entry.get("idle", ())}
        if not entry["taken"]:
            nothing.add(name)
        if entry.get("attn_implementation", "equal") != "equal":
            refused[_without_names(entry["attn_implementation"])].add(name)
    oldest = record["oldest"]
    versions = ", ".join(f"{name} {record[name]}" for name in PACKAGES)
    lines = [
        BEGIN.strip(),
        f"{len(record['models'])} tiny models were fused with {versions}, and compared with themselves as they were.",
        "`tests/swapped_models/record.json` has an entry for each; `make record-models` writes it and this list.",
        "",
        "**Taken**: the op, the calls that it computes, and the classes.",
        "",
        *(f"- {_quoted(reason)}. {_names(classes)}" for reason, classes in sorted(taken.items())),
        "",
        "**Taken, but idle**: these models hand to these classes what the op does not have, such as a causal mask, so",
        f"that their own forward or torch's attention computes: {_names(idle)}.",
        "",
        "**Left**: why, and the classes that were.",
        "",
        *(f"- **{reason}**: {_names(classes)}" for reason, classes in sorted(left.items())),
        "",
        '**`attn_implementation="sclkern"`** gives the same as `"eager"`, except in these models:',
        "",
        *(f"- **{reason}**: {_names(names)}" for reason, names in sorted(refused.items())),
        "",
        f"**Nothing is taken** in {len(nothing)} of them: {_names(nothing)}.",
        "",
        f"**Not built with transformers {oldest.get('transformers')}**, the oldest, which lacks them or has other",
        f"configurations: {_names(set(oldest.get('without', ())))}.",
        "",
    ]
    return "\n".join(line for line in lines) + END


def _quoted(reason: str) -> str:
    op, _, calls = reason.partition(": ")
    return f"**{op}**: {calls}"


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names, key=str.lower))


def _without_names(reason: str) -> str:
    """A message of a class for all classes."""
    return re.sub(r"\b[A-Z]\w+(Model|ForCausalLM|ForConditionalGeneration|For[A-Z]\w+)\b", "the model", reason)


PACKAGES = ("transformers", "timm", "open_clip_torch")


def page(record: dict[str, Any], text: str) -> str:
    """The page with its list written from the record.

    Args:
        record: the record of all models.
        text: the page as it is.

    Returns:
        The page as it should be.
    """
    before, rest = text.split(BEGIN)
    return before + section(record) + rest.split(END)[1]


def _examine(name: str) -> tuple[str, dict[str, Any], list[str]]:
    import torch

    from swapped_models.checks import examine

    torch.set_num_threads(1)
    outcome, faults = examine(name)
    return name, outcome, list(faults)


def _build(name: str) -> str | None:
    """The name, if the installed packages cannot build the model."""
    import torch

    from swapped_models.checks import outputs
    from swapped_models.table import build

    torch.set_num_threads(1)
    try:
        outputs(*build(name, attn_implementation="eager"))
    except Exception:
        return name
    return None


def record_oldest() -> int:
    """Write which models the installed transformers, the oldest that is supported, lacks or builds otherwise.

    Returns:
        The exit status, 0.
    """
    from swapped_models.table import MODELS

    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=50) as pool:
        without = sorted(name for name in pool.imap_unordered(_build, MODELS) if name is not None)
    oldest = {"transformers": importlib.metadata.version("transformers"), "without": without}
    save(load() | {"oldest": oldest})
    return 0


def main(names: list[str]) -> int:
    """Examine models and write the record and the page.

    Args:
        names: models of the table; empty for all; or only "--oldest", see ``record_oldest``.

    Returns:
        The exit status: 1 if a model has a fault.
    """
    from swapped_models.table import MODELS

    if names == ["--oldest"]:
        return record_oldest()
    former = load() if FILE.exists() else {"models": {}, "oldest": {}}
    record = {"models": former["models"] if names else {}}
    faulty = 0
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name, outcome, faults in pool.imap_unordered(_examine, names or list(MODELS)):
            record["models"][name] = outcome
            faulty += bool(faults)
            print(name, *faults, sep="\n    ", flush=True)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record = versions | {"oldest": former["oldest"], "models": dict(sorted(record["models"].items()))}
    save(record)
    PAGE.write_text(page(record, PAGE.read_text()))
    print(f"{len(record['models'])} models, {faulty} with faults")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
