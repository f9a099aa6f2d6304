"""The log of a run: a progress bar, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sclkern.errors import UserError
from sclkern.io import write_atomically
from sclkern.training.tracking import Tracker


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a line cut short or damaged by a crash is left out."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("kind"), str) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class RunLog:
    """Metrics of a run; a context manager that closes the files.

    Args:
        directory: folder of the run.
        start: step that a resumed run continues from; rows of later steps are dropped, as those steps run again.
        total: last step.
        validated: last step whose validation does not run again; None is ``start``.
        tracker: receives what is written too.
    """

    def __init__(
        self,
        directory: Path,
        *,
        start: int,
        total: int,
        validated: int | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self._tracker = tracker
        self.path = directory / "metrics.jsonl"
        last = {"val": start if validated is None else validated}
        rows = [row for row in read_metrics(self.path) if row["step"] <= last.get(row["kind"], start)]
        write_atomically(self.path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self._described = ""
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self, step: int, values: Mapping[str, str]) -> None:
        """Print what a run runs on, and write it before the first row of this process: {"kind": "run", "step", ...}.

        Args:
            step: that the process starts from.
            values: names of what runs, by what it does.
        """
        self.message(", ".join(f"{what.replace('_', ' ')} {name}" for what, name in values.items()))
        # Not at once: a run that is stopped before its first step leaves no row.
        self._described = json.dumps({"kind": "run", "step": step, **values}) + "\n"

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one row, {"kind", "step", ...values}; a value that is not finite is written as null.

        Args:
            kind: "train" or "val".
            step: number of the step.
            values: losses, metrics and rates by name.

        Raises:
            UserError: the disk is full.
        """
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self._writing(self.path):
            self._file.write(self._described + json.dumps({"kind": kind, "step": step, **plain}) + "\n")
        self._described = ""
        with self._writing(Path(self._board.log_dir)):
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._tracker is not None:
            self._tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def write_ranks(self, step: int, ranks: Sequence[Mapping[str, float]]) -> None:
        """Write a row of the values of each process, {"kind": "ranks", "step", name: [of rank 0, of rank 1, ...]}.

        Args:
            step: number of the step.
            ranks: values by name, of the same names for each process.

        Raises:
            UserError: the disk is full.
        """
        columns = {name: [rank[name] for rank in ranks] for name in ranks[0]}
        with self._writing(self.path):
            self._file.write(json.dumps({"kind": "ranks", "step": step, **columns}) + "\n")

    @staticmethod
    @contextlib.contextmanager
    def _writing(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # which names no file, because it was open already
            reason = error.strerror or error
            raise UserError(f"{path}: cannot be written ({reason}); free space, then go on with --resume") from error

    def progress(self, losses: Mapping[str, float], pairs_per_second: float) -> None:
        """Show losses and rate in the progress bar."""
        shown = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        self._bar.set_postfix_str(f"{shown} | {pairs_per_second:.0f} pairs/s", refresh=False)

    def advance(self) -> None:
        """Advance the progress bar by a step."""
        self._bar.update()

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(text)

    def close(self) -> None:
        """End the progress bar and close the files."""
        self._bar.close()
        if self._tracker is not None:
            self._tracker.finish()
        # Whoever first wrote to a full disk has raised the error already.
        for stream in (self._board, self._file):
            with contextlib.suppress(OSError):
                stream.close()


class SilentLog:
    """Takes what a ``RunLog`` takes, and writes nothing: the log of every process but rank 0."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def describe(self, step: int, values: Mapping[str, str]) -> None:
        """Nothing."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def write_ranks(self, step: int, ranks: Sequence[Mapping[str, float]]) -> None:
        """Nothing."""

    def progress(self, losses: Mapping[str, float], pairs_per_second: float) -> None:
        """Nothing."""

    def advance(self) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""
