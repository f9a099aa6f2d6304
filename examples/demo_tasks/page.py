"""The page of results that `make demo-tasks` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.demo_tasks.figures import Figure
from sclkern.io import write_atomically
from sclkern.tools.bench.demo_tasks import figures_table


def write(path: Path, figures: Sequence[Figure], seconds: dict[str, float]) -> None:
    """Write the page.

    Args:
        path: of the Markdown file.
        figures: of all tasks.
        seconds: that each task took that was run from its beginning.
    """
    lines = [
        "# The tasks of the demo",
        "",
        figures_table([figure._asdict() for figure in figures]),
        "",
    ]
    if seconds:
        times = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
        lines += [f"Minutes: {times}, together {sum(seconds.values()) / 60:.1f}.", ""]
    write_atomically(path, lambda file: file.write_text("\n".join(lines), encoding="utf-8"))
