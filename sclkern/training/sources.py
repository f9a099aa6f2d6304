"""The sources of a run, as its configuration names them, mixed where there are several."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sclkern.data import PairSource, open_pairs
from sclkern.data.mixture import KINDS, Kind, kind_of, mix_pairs
from sclkern.data.names import expand_names
from sclkern.errors import UserError
from sclkern.training.config import PretrainConfig
from sclkern.training.sections import DataConfig, SourceConfig

log = logging.getLogger("sclkern.training")


@dataclass(frozen=True)
class Mixed:
    """The sources of one kind.

    Attributes:
        source: all of them.
        weight: of all of them: the sum of their weights, or of their pairs.
        weighted: pairs and weight of each; None where they have no weights.
    """

    source: PairSource
    weight: float
    weighted: list[tuple[int, float]] | None


def open_sources(data: DataConfig, *, training: bool) -> dict[Kind, Mixed]:
    """Open the sources of a set.

    Args:
        data: names them.
        training: whether those to train on; else those held out.

    Returns:
        The sources by their kind, images first.

    Raises:
        UserError: one cannot be opened; of several the message has the number.
    """
    name, named = ("sources", data.sources) if training else ("val_sources", data.val_sources)
    replaced = ("train_tables", "train_split") if training else ("val_tables", "val_split")
    for key in replaced if named is not None else ():
        if getattr(data, key) != getattr(DataConfig, key):
            log.warning(f"data.{key} is not read, because data.{name} takes its place")
    opened: list[tuple[PairSource, str, float | None]] = []
    if named is None:
        tables, split = (data.train_tables, data.train_split) if training else (data.val_tables, data.val_split)
        opened.append((open_pairs(data.root, tables, split, format=data.format), data.root, None))
    else:
        _check_twice(data, name, named)
        for number, one in enumerate(named):
            root = data.root if one.root is None else one.root
            try:
                source = open_pairs(
                    root, one.tables, one.split, format=data.format if one.format is None else one.format
                )
            except UserError as error:
                raise UserError(_of_source(error, f"data.{name}.{number}", one)) from error
            opened.append((source, root, one.weight))
    kinds: dict[Kind, Mixed] = {}
    for kind in KINDS:
        chosen = [one for one in opened if kind_of(one[0]) == kind]
        if chosen:
            sources = [source for source, _, _ in chosen]
            weighted = [(source.num_pairs, weight) for source, _, weight in chosen if weight is not None]
            total = sum(share for _, share in weighted) if weighted else sum(source.num_pairs for source in sources)
            mixed = mix_pairs(sources, [root for _, root, _ in chosen])
            kinds[kind] = Mixed(mixed, total, weighted if len(weighted) > 1 else None)
    return kinds


def _of_source(error: UserError, where: str, one: SourceConfig) -> str:
    """The message about a source; the keys that it has of its own are not those of the data."""
    message = str(error)
    for key in ("root", "format"):
        if getattr(one, key) is not None:
            message = re.sub(rf"\bdata\.{key}\b", f"{where}.{key}", message)
    return message if message.startswith(where) else f"{where}: {message}"


def _check_twice(data: DataConfig, name: str, named: Sequence[SourceConfig]) -> None:
    """Raise a ``UserError`` if a table is read twice: a contrast would take a picture for a negative of itself."""
    # Where each table is read, by folder and name. A source may have a hundred thousand, so only patterns are matched.
    exact: dict[tuple[str, str], list[tuple[int, str | None]]] = {}
    patterns: dict[tuple[str, str], list[tuple[int, str | None]]] = {}
    for number, one in enumerate(named):
        root = data.root if one.root is None else one.root
        for table in (each for names in one.tables for each in expand_names(names)):
            is_pattern = re.search(r"[*?[]", table) is not None
            found = [known for known in patterns if known[0] == root and _matches(table, known[1])]
            found += [(root, table)] if (root, table) in exact else []
            found += [known for known in exact if known[0] == root and _matches(known[1], table)] if is_pattern else []
            for known in found:
                for other, split in [*exact.get(known, ()), *patterns.get(known, ())]:
                    if None in (split, one.split) or split == one.split:
                        where = "it" if other == number else f"data.{name}.{other}"
                        raise UserError(
                            f"data.{name}.{number}.tables: got {table!r}, which {where} reads as {known[1]!r} too, "
                            "expected each table once, because a picture would be a negative of itself; remove it, and "
                            "give what is to come more often a larger weight"
                        )
            (patterns if is_pattern else exact).setdefault((root, table), []).append((number, one.split))


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern of tables has this one; its ``*`` does not go into folders."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def check_frames(config: PretrainConfig, kinds: Mapping[Kind, Mixed]) -> None:
    """Raise a ``UserError`` if there are clips, and the model does not take their frames."""
    frames, most = config.data.num_frames, config.model.max_frames
    if "clips" in kinds and not 1 <= frames <= most:
        raise UserError(
            f"data.num_frames: got {frames}, expected 1 to model.max_frames {most}, because the data have clips; set "
            f"model.max_frames={max(frames, 1)} or model.preset=base_video"
        )
