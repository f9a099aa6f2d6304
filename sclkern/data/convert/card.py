"""The card of a conversion: what was found, missing, undecodable and dropped, for a program and for a reader."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from sclkern.data.convert.plan import Options, Plan
from sclkern.data.text import one_line
from sclkern.io import write_atomically

# Undecodable files that the card names; the table's metadata has all.
_NAMED = 200
_SHOWN = 5


def card_path(output: Path, name: str) -> Path:
    """Where the card of a set lies; the text for a reader is beside it, as ``.txt``."""
    return output / f"{name}.card.json"


def build_card(name: str, source: str, options: Options, plan: Plan) -> dict[str, Any]:
    """The card before any table is written.

    Args:
        name: of the set.
        source: its folder.
        options: of the conversion.
        plan: of the conversion.

    Returns:
        What ``write_card`` writes.
    """
    return {
        "set": name,
        "complete": False,
        "source": source,
        "options": _plain(options),
        "found": plan.found,
        "missing": {"count": plan.missing.total, "reasons": plan.missing.report()},
        "dropped": {"count": plan.dropped.total, "reasons": plan.dropped.report()},
        "undecodable": {"count": 0, "files": {}},
        "notes": plan.notes,
        "tables": {},
    }


def add_undecodable(card: dict[str, Any], reasons: dict[str, str]) -> None:
    """Enter files that could not be used.

    Args:
        card: to change.
        reasons: by name of the file, of all tables so far.
    """
    named = islice(sorted(reasons.items()), _NAMED)
    card["undecodable"] = {"count": len(reasons), "files": {one_line(file, 300): reason for file, reason in named}}


def _plain(options: Options) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}


def write_card(output: Path, card: dict[str, Any]) -> None:
    """Write both forms of a card.

    Args:
        output: folder of the tables.
        card: as of ``build_card``.
    """
    path = card_path(output, card["set"])
    content = json.dumps(card, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    text = card_text(card).encode("utf-8", "backslashreplace")
    write_atomically(path.with_suffix(".txt"), lambda temporary: temporary.write_bytes(text))


def read_card(output: Path, name: str) -> dict[str, Any]:
    """The card of an earlier conversion; empty where there is none."""
    try:
        card: dict[str, Any] = json.loads(card_path(output, name).read_bytes())
        return card
    except (OSError, ValueError):
        return {}


def card_text(card: dict[str, Any]) -> str:
    """A card for a reader.

    Args:
        card: as of ``build_card``.

    Returns:
        Lines of text.
    """
    lines = [f"{card['set']}: {'complete' if card['complete'] else 'not complete'}, from {card['source']}"]
    default = _plain(Options())
    chosen = ", ".join(f"{key}={value}" for key, value in card["options"].items() if value != default[key])
    lines += [f"options: {chosen or 'none'}", "", "found"]
    lines += [f"  {count:>11,}  {what}" for what, count in card["found"].items()]
    for kind in ("missing", "dropped"):
        lines += ["", f"{kind}: {card[kind]['count']:,}"]
        for reason, entry in card[kind]["reasons"].items():
            lines.append(f"  {entry['count']:>11,}  {reason}{_names(entry['names'], entry['count'])}")
    bad = card["undecodable"]
    lines += ["", f"undecodable: {bad['count']:,}"]
    lines += [f"  {file} ({reason})" for file, reason in list(bad["files"].items())[:_SHOWN]]
    if bad["count"] > _SHOWN:
        lines.append("  ...")
    lines += ["", "written"]
    lines += [
        f"  {table['rows']:>11,}  {name}.arrow ({table['bytes'] / 1e6:,.1f} MB)"
        for name, table in card["tables"].items()
    ]
    if card["notes"]:
        lines += ["", "notes", *(f"  {note}" for note in card["notes"])]
    return "\n".join(lines) + "\n"


def _names(names: list[str], count: int) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f" ({shown}{', ...' if count > _SHOWN else ''})" if shown else ""
