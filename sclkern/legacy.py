"""Option values that earlier versions wrote into files, in today's words. Nothing else in the package knows them.

Configurations (YAML), the ``config.yaml`` of a run's folder and the checkpoints of a run written before version 0.1.0
name the behaviour of the published code ``"reference"``; it is ``"published"`` now. Every reader of such a file passes
what it read through ``translate_config`` first.

A run of then had other pairs of the same image among its negatives, and no word for it: a section with all options of
objectives, but without ``same_image``, is one of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The options that had the value, by section. In any other option, "reference" may be a name that the user chose.
_PUBLISHED_OPTIONS: Mapping[str, frozenset[str]] = {
    "objectives": frozenset(
        {
            "negatives",
            "gather",
            "directions",
            "text_mask",
            "mlm_mask",
            "itm_negatives",
            "frame_norm",
            "itc_temperature",
            "empty_selections",
        }
    ),
    "optimizer": frozenset({"no_decay"}),
}


def translate_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the option values of earlier versions.

    Args:
        values: sections of a run's configuration, each with plain values by key, as YAML and checkpoints hold them.
            What is not a section with keys is passed through, for the reader to refuse.

    Returns:
        A new mapping with today's values; ``values`` and its sections stay as they are.
    """
    translated = {
        name: _translate_section(section, _PUBLISHED_OPTIONS.get(name, frozenset()))
        if isinstance(section, Mapping)
        else section
        for name, section in values.items()
    }
    objectives = translated.get("objectives")
    if isinstance(objectives, dict) and objectives.keys() >= _PUBLISHED_OPTIONS["objectives"]:
        objectives.setdefault("same_image", "published")
    return translated


def _translate_section(section: Mapping[str, Any], options: frozenset[str]) -> dict[str, Any]:
    return {key: "published" if key in options and value == "reference" else value for key, value in section.items()}
