"""The report of a run: losses, its course, recalls against chance, and what was skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sclkern.data.text import escape_markdown
from sclkern.evaluation.ranking import RECALL_AT
from sclkern.evaluation.retrieval import RetrievalResult
from sclkern.io import write_atomically
from sclkern.objectives import OBJECTIVES
from sclkern.training.course import course_section, plot_course


@dataclass(frozen=True)
class RunSummary:
    """What a report shows.

    Attributes:
        description: the run in one line.
        rows: rows of ``metrics.jsonl``.
        retrieval: results by the name of their set, such as "held-out"; empty if the recipe trains no contrast.
        rerank: candidates that ITM re-ranked.
        undecodable: number of skipped images by the name of their set.
        attention: plot of attention in the report's folder; None if there is none.
    """

    description: str
    rows: Sequence[Mapping[str, Any]]
    retrieval: Mapping[str, RetrievalResult]
    rerank: int
    undecodable: Mapping[str, int]
    attention: Path | None = None


def write_report(summary: RunSummary, directory: Path) -> Path:
    """Write ``report.md`` and, if there are rows, ``losses.png`` and ``course.png``.

    Args:
        summary: what the report shows.
        directory: folder to write.

    Returns:
        The path of the report.
    """
    if summary.rows:
        plot_losses(summary.rows, directory / "losses.png")
        plot_course(summary.rows, directory / "course.png")
    path = directory / "report.md"
    write_atomically(path, lambda temporary: temporary.write_text(format_report(summary), encoding="utf-8"))
    return path


def plot_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each loss: training and held-out, against the step.

    Args:
        rows: rows of ``metrics.jsonl``.
        path: PNG file to write.
    """
    titles = {name: title for name, title in _titles().items() if any(name in row for row in rows)}
    columns = -(-len(titles) // 2)
    figure = Figure(figsize=(4 * columns, 6))
    axes = list(figure.subplots(2, columns, squeeze=False).flat)
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        for kind, label, style in (("train", "training", "-"), ("val", "held out", "o-")):
            points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[len(titles) :]:
        axis.axis("off")
    axes[0].legend()
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def format_report(summary: RunSummary) -> str:
    """The report as Markdown, with links to the plots beside it."""
    lines = ["# Pre-training report", "", escape_markdown(summary.description), ""]
    lines += _loss_section(summary.rows) + course_section(summary.rows) + _retrieval_section(summary)
    if summary.attention is not None:
        lines += ["", "## Attention of words over held-out images", "", f"![attention]({summary.attention.name})", ""]
        lines += ["Last fusion layer, text to image, the largest over heads, each map scaled to its own range."]
    for name, count in summary.undecodable.items():
        if count:
            lines += ["", f"Undecodable {escape_markdown(name)} images, skipped: {count}"]
    return "\n".join(lines) + "\n"


def _loss_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["## Losses", "", "None: no step is logged.", ""]
    lines = ["## Losses", "", "| loss | first step | last logged step | held-out, last |", "|---|---|---|---|"]
    train = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row["kind"] == "val"]
    for name, title in _titles().items():
        if train and name in train[0]:
            values = [train[0][name], train[-1][name], held_out[-1][name] if held_out else None]
            cells = " | ".join("" if value is None else f"{value:.3f}" for value in values)
            lines.append(f"| {title} | {cells} |")
    return [*lines, "", "![losses](losses.png)", ""]


def _retrieval_section(summary: RunSummary) -> list[str]:
    if not summary.retrieval:
        return ["## Retrieval, zero-shot", "", "None: no objective of the recipe trains the ITC head, which ranks."]
    lines = [
        "## Retrieval, zero-shot",
        "",
        "Recall in percent. Images with the same caption are all right answers to it; each distinct caption is one",
        "candidate. ITC ranks by the similarity of both encoders; ITM re-ranks its first",
        f"{summary.rerank} by the fusion encoder. Chance is the expectation of a random order.",
        "",
        "| set | direction | method | " + " | ".join(f"R@{k}" for k in RECALL_AT) + " |",
        "|---|---|---|" + "---|" * len(RECALL_AT),
    ]
    for name, result in summary.retrieval.items():
        gallery = f"{escape_markdown(name)}, {result.images} images, {result.captions} captions"
        for direction in ("image_to_text", "text_to_image"):
            for method, title in (("itc", "ITC"), ("itm", "ITM"), ("chance", "chance")):
                if f"{method}_{direction}_r1" in result.recalls:
                    values = [100 * result.recalls[f"{method}_{direction}_r{k}"] for k in RECALL_AT]
                    cells = " | ".join(f"{value:.1f}" for value in values)
                    lines.append(f"| {gallery} | {direction.replace('_', ' ')} | {title} | {cells} |")
    return lines


def _titles() -> dict[str, str]:
    """Losses in the order of a report, by name, with their titles."""
    return {"total": "total"} | {objective.name: objective.title for objective in OBJECTIVES.values()}
