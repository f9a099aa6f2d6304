"""What a run writes while it goes: a progress bar, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sclkern.io import write_atomically


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


class RunLog:
    """Metrics of a run, on the main process.

    Args:
        directory: run folder. start: the step a resumed run goes on from: later rows are dropped, as those steps run
            again. total: last step.
    """

    def __init__(self, directory: Path, *, start: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / "metrics.jsonl"
        rows = [row for row in read_metrics(self.path) if row["step"] <= start]
        write_atomically(self.path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One row: {"kind", "step", ...values}; a value that is not finite is written as null."""
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, losses: dict[str, float], samples_per_second: float) -> None:
        shown = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        self._bar.set_postfix_str(f"{shown} | {samples_per_second:.0f} pairs/s", refresh=False)

    def advance(self) -> None:
        self._bar.update()

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        # A disk that is full has been told of already, by whoever wrote to it first.
        for stream in (self._board, self._file):
            with contextlib.suppress(OSError):
                stream.close()
