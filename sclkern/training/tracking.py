"""The hook for an experiment tracker: what the log of a run shows goes to wandb or trackio too."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from sclkern.errors import UserError
from sclkern.io import write_atomically

TrackerName = Literal["wandb", "trackio"]
PROJECT = "sclkern"
# In the folder of a run: which run of the tracker it is.
ID_FILE = "tracker.txt"


class Tracker(Protocol):
    """What a log needs of a tracked run; that of wandb is one."""

    def log(self, data: Mapping[str, Any], *, step: int) -> Any:
        """Add values of a step."""

    def finish(self) -> Any:
        """End the run; what is not yet sent is sent."""


def check_tracker(name: TrackerName | None) -> None:
    """Raise a ``UserError`` unless the package of a tracker is installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"run.tracker: got {name!r}, which is not installed; pip install {name}, or set it to null")


def open_tracker(
    name: TrackerName | None, directory: Path, *, resumed: bool, config: Mapping[str, Any]
) -> Tracker | None:
    """Begin a tracked run, or go on with that of a folder.

    Where it is sent, and whether at all, the variables of the tracker say, such as ``WANDB_PROJECT`` and
    ``WANDB_MODE=offline``; trackio keeps it on this machine.

    Args:
        name: of the tracker; None tracks nothing.
        directory: folder of the run; its name is that of the tracked run.
        resumed: whether a run of this folder goes on.
        config: of the run, which the tracker shows.

    Returns:
        The tracked run.
    """
    if name is None:
        return None
    file = directory / ID_FILE
    known = file.read_text().split() if resumed and file.exists() else []
    number = known[1] if len(known) == 2 and known[0] == name else uuid.uuid4().hex[:12]
    write_atomically(file, lambda path: path.write_text(f"{name} {number}\n"))
    title = directory.resolve().name
    if name == "wandb":
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        run: Tracker = wandb.init(
            project=project, name=title, id=number, resume="allow", dir=str(directory), config=dict(config)
        )
        return run
    import trackio

    # trackio knows a run by its name.
    trackio_run: Tracker = trackio.init(
        project=PROJECT, name=f"{title}-{number}", resume="allow", config=dict(config), embed=False
    )
    return trackio_run
