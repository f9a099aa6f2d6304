"""The report of a run: loss curves, attention of words over held-out pictures, and recalls against chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sclkern.data.transforms import denormalize
from sclkern.evaluation.retrieval import RECALL_AT, RetrievalResult
from sclkern.io import write_atomically
from sclkern.training.logs import read_metrics

if TYPE_CHECKING:
    from sclkern.training.loop import Pretraining

_LOSSES = ("total", "itm", "mlm", "itc", "mvsc", "mlsc", "mltc")
_TITLES = {
    "total": "total",
    "itm": "ITM, image-text matching",
    "mlm": "MLM, masked language modelling",
    "itc": "ITC, image-text contrast",
    "mvsc": "MVSC, masked vision completion",
    "mlsc": "MLSC, masked language completion",
    "mltc": "MLTC, masked local token completion",
}


def write_report(run: Pretraining) -> Path:
    """Write ``losses.png``, ``attention.png`` and ``report.md`` into the run folder; returns the path of the report."""
    rows = read_metrics(run.directory / "metrics.jsonl")
    evaluation = run.config.evaluation
    results = {"held-out": run.retrieval(run.val_table)}
    if evaluation.train_images:
        results["training"] = run.retrieval(run.train_table, evaluation.train_images)
    if rows:
        plot_losses(rows, run.directory / "losses.png")
    pictures = evaluation.attention_images > 0 and run.config.model.fusion_layers > 0
    if pictures:
        plot_attention(run, run.directory / "attention.png", evaluation.attention_images)
    path = run.directory / "report.md"
    text = _markdown(run, rows, results, pictures)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each loss: training and held-out, against the step."""
    plt = _pyplot()
    names = [name for name in _LOSSES if any(name in row for row in rows)]
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(4 * -(-len(names) // 2), 6), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for kind, label, style in (("train", "training", "-"), ("val", "held out", "o-")):
            points = [(r["step"], r[name]) for r in rows if r["kind"] == kind and r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        axis.set_title(_TITLES[name], fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    axes.flat[0].legend()
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


@torch.no_grad()
def plot_attention(run: Pretraining, path: Path, count: int, words_shown: int = 5) -> None:
    """Held-out pictures with the attention of their words: last fusion layer, text to image, the largest over heads,
    without the image CLS, sub-words summed (as ALIGN-BENCH reads it); first the text CLS, then each word. Each map is
    scaled from its lowest value to its highest."""
    plt = _pyplot()
    model, table = run.model.eval(), run.val_table
    chosen = _long_captions(run, count)
    size = (1.7 * (words_shown + 2), 1.85 * len(chosen))
    figure, axes = plt.subplots(len(chosen), words_shown + 2, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, pair in enumerate(chosen):
        caption = table.caption(pair)
        ids, mask = run.tokenizer([caption], model.config.max_text_len)
        image = table.image(int(table.pair_image[pair]))
        pixels = run.val_transform(image)[None].to(run.device)
        features = model.encode_image(pixels)
        text = model.encode_text(ids.to(run.device), mask.to(run.device))
        fused = model.fuse(text, mask.to(run.device), features, return_attention=True)
        weights = fused.attentions[-1].text_to_image[0].amax(0)[:, features.num_frames :]
        picture = denormalize(pixels[0]).permute(1, 2, 0).cpu().numpy()
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title(_shorten(caption, 24), fontsize=7)
        words = [("whole text", [0]), *_words(run, ids[0, 1 : int(mask.sum()) - 1].tolist())]
        for axis, (word, tokens) in zip(axes[row, 1:], words, strict=False):
            heat = weights[tokens].sum(0).view(model.config.grid, -1).float().cpu().numpy()
            heat = (heat - heat.min()) / max(heat.max() - heat.min(), 1e-12)
            axis.imshow(picture)
            sides = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
            axis.imshow(heat, cmap="jet", alpha=0.5, interpolation="bilinear", extent=sides)
            axis.set_title(_shorten(word, 16), fontsize=8)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


def _words(run: Pretraining, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Words of a caption with the positions of their tokens: a token that begins with a space begins a word."""
    words: list[tuple[str, list[int]]] = []
    for position, token in enumerate(ids, start=1):
        text = run.tokenizer.decode([token])
        if words and not text.startswith(" "):
            words[-1] = (words[-1][0] + text, [*words[-1][1], position])
        else:
            words.append((text.strip(), [position]))
    return words


def _long_captions(run: Pretraining, count: int) -> list[int]:
    """Pairs with different captions, spread over the table, of three words or more where there are any."""
    table = run.val_table
    bad = set(run.bad_val_pictures.state_dict()["names"])  # complete, as retrieval has seen every held-out picture
    _, first = np.unique(table.pair_group, return_index=True)
    pairs = [int(pair) for pair in sorted(first) if table.image_name(int(table.pair_image[pair])) not in bad]
    rich = [pair for pair in pairs if len(table.caption(pair).split()) >= 3] or pairs
    return [rich[i] for i in np.linspace(0, len(rich) - 1, min(count, len(rich))).round().astype(int)]


def _markdown(run: Pretraining, rows: list[dict], results: dict[str, RetrievalResult], pictures: bool) -> str:
    train = [row for row in rows if row["kind"] == "train"]
    held = [row for row in rows if row["kind"] == "val"]
    lines = ["# Pre-training report", "", run.describe(), "", "## Losses", ""]
    lines += ["| loss | first step | last logged step | held-out, last |", "|---|---|---|---|"]
    for name in _LOSSES:
        if train and name in train[0]:
            values = [train[0][name], train[-1][name], held[-1][name] if held else None]
            cells = " | ".join("" if value is None else f"{value:.3f}" for value in values)
            lines.append(f"| {_TITLES[name]} | {cells} |")
    lines += ["", "![losses](losses.png)", "", "## Retrieval, zero-shot", ""]
    lines += [
        "Recall in percent. Pictures with the same caption are all right answers to it; each distinct caption is one",
        "candidate. ITC ranks by the contrast of both encoders; ITM re-ranks its first "
        f"{run.config.evaluation.rerank} by the fusion encoder. Chance is the expectation of a random order.",
        "",
        "| set | direction | method | " + " | ".join(f"R@{k}" for k in RECALL_AT) + " |",
        "|---|---|---|" + "---|" * len(RECALL_AT),
    ]
    for name, result in results.items():
        size = f"{name}, {result.images} pictures, {result.captions} captions"
        for direction in ("image_to_text", "text_to_image"):
            for method in ("itc", "itm", "chance"):
                if f"{method}_{direction}_r1" in result.recalls:
                    cells = " | ".join(f"{100 * result.recalls[f'{method}_{direction}_r{k}']:.1f}" for k in RECALL_AT)
                    shown = method.upper() if method != "chance" else "chance"
                    lines.append(f"| {size} | {direction.replace('_', ' ')} | {shown} | {cells} |")
    if pictures:
        lines += ["", "## Attention of words over held-out pictures", "", "![attention](attention.png)"]
        lines += [
            "",
            "Last fusion layer, text to image, the largest over heads, each map scaled to its own range.",
        ]
    for name, bad in (("training", run.bad_pictures), ("held-out", run.bad_val_pictures)):
        if len(bad):
            lines += ["", f"Undecodable {name} pictures, skipped: {len(bad)}"]
    return "\n".join(lines) + "\n"


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
