"""The sources of a run, as its configuration names them, mixed where there are several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from sclkern.data import PairSource, open_pairs
from sclkern.data.mixture import KINDS, Kind, kind_of, mix_pairs
from sclkern.errors import UserError
from sclkern.training.config import PretrainConfig
from sclkern.training.sections import DataConfig

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
        for number, one in enumerate(named):
            root = data.root if one.root is None else one.root
            try:
                source = open_pairs(
                    root, one.tables, one.split, format=data.format if one.format is None else one.format
                )
            except UserError as error:
                raise UserError(f"data.{name}.{number}: {error}") from error
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


def check_frames(config: PretrainConfig, kinds: Mapping[Kind, Mixed]) -> None:
    """Raise a ``UserError`` if there are clips, and the model does not take their frames."""
    frames, most = config.data.num_frames, config.model.max_frames
    if "clips" in kinds and not 1 <= frames <= most:
        raise UserError(
            f"data.num_frames: got {frames}, expected 1 to model.max_frames {most}, because the data have clips; set "
            f"model.max_frames={max(frames, 1)} or model.preset=base_video"
        )
