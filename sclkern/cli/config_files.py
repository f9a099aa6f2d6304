"""The configurations that ship with the package, and what ``--config`` may name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sclkern.errors import UserError
from sclkern.training.config import PretrainConfig, load_config

# A link to configs/ in the source tree; a folder of files in an installed package.
FOLDER = Path(__file__).parents[1] / "configs"


def shipped_configs() -> dict[str, Path]:
    """The shipped configuration files by name, in alphabetical order."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def find_config(value: str) -> Path:
    """Find the file that ``--config`` names.

    Args:
        value: a path (anything with a path separator, or an existing file), or the name of a shipped configuration. A
            file in the working directory wins over a shipped name.

    Returns:
        The file; a path with a separator is not checked.

    Raises:
        UserError: neither a file nor a shipped name.
    """
    separators = {os.sep, os.altsep or os.sep}
    if any(separator in value for separator in separators) or Path(value).is_file():
        return Path(value)
    shipped = shipped_configs()
    if value not in shipped:
        raise UserError(f"--config: got {value!r}, expected a file or one of {', '.join(shipped)}")
    return shipped[value]


def load(value: str | None, overrides: Sequence[str]) -> PretrainConfig:
    """Load the configuration that a command line gives.

    Args:
        value: of ``--config``; None = every key has its default.
        overrides: ``section.key=value``.

    Returns:
        The checked configuration.
    """
    return load_config(None if value is None else find_config(value), overrides)
