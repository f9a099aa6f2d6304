"""``sclkern configs``: the shipped configurations, and every key."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from sclkern.cli.config_files import find_config, shipped_configs
from sclkern.errors import UserError
from sclkern.training.config import ConfigKey, PretrainConfig, config_keys


def run(options: argparse.Namespace) -> int:
    """Print the list, one configuration, or the keys."""
    if options.keys and options.config:
        raise UserError(f"--keys: describes every configuration; leave {options.config!r} out")
    if options.keys:
        print(format_keys(config_keys()))
    elif options.config:
        print(find_config(options.config).read_text(), end="")
    else:
        files = shipped_configs()
        width = max(map(len, files))
        for name, file in files.items():
            print(f"{name:<{width}}  {summary(file)}")
    return 0


def summary(file: Path) -> str:
    """Return the first comment line of a configuration file, without its "#"."""
    return file.read_text().partition("\n")[0].removeprefix("#").strip()


def format_keys(keys: Sequence[ConfigKey], width: int = 110) -> str:
    """Format the keys of a configuration as text.

    Args:
        keys: from ``config_keys``, section by section.
        width: longest line of a meaning in characters.

    Returns:
        A paragraph a section; in it ``section.key = default``, in YAML, and below each its meaning.
    """
    kinds = get_type_hints(PretrainConfig)
    lines = []
    for section, members in itertools.groupby(keys, key=lambda key: key.name.partition(".")[0]):
        lines += [f"{section}: {_plain((inspect.getdoc(kinds[section]) or '').partition(chr(10))[0])}", ""]
        for key in members:
            lines.append(f"  {key.name} = {_yaml(key.default)}")
            lines += textwrap.wrap(_plain(key.meaning), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines[:-1])


def _yaml(value: object) -> str:
    """Write a value as it may stand in YAML and in an override."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _plain(text: str) -> str:
    return text.replace("``", "`")
