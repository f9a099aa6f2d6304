"""Whether sharing encodings costs accuracy: the demo with dropout, for each ``step.share_encodings`` and some seeds.

Sharing is exact without dropout; with dropout, passes that share a text share the mask of the text encoder.
`python -m benchmarks.training.shared_encodings` trains (half an hour and more on two cores), appends the record and
draws the plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.training.demo_runs import ROOT, logged, train
from sclkern.tools.bench import records

COLORS = {"all": "tab:blue", "images": "tab:green", "none": "tab:orange"}
# Steps at the end whose mean loss is compared.
LAST_STEPS = 50


def changes(shared: str, seed: int, steps: int) -> dict[str, object]:
    return {
        "run.seed": seed, "run.max_steps": steps, "run.val_every": 0, "model.dropout": 0.1,
        "step.share_encodings": shared, "evaluation.train_images": 0, "evaluation.rerank": 0,
    }  # fmt: skip


def curve(folder: Path, kind: str = "train") -> list[tuple[int, float]]:
    return [(row["step"], row["total"]) for row in logged(folder, kind)]


def summary(folders: dict[tuple[str, int], Path]) -> dict:
    """By value of ``share_encodings``: each seed's mean training loss of the last steps and final held-out loss."""
    losses: dict[str, dict[str, list[float]]] = {}
    for (shared, _), folder in sorted(folders.items()):
        steps = curve(folder)
        end = [loss for step, loss in steps if step > steps[-1][0] - LAST_STEPS]
        of_value = losses.setdefault(shared, {"training": [], "held_out": []})
        of_value["training"].append(statistics.mean(end))
        of_value["held_out"].append(curve(folder, "val")[-1][1])
    return losses


def plot(folders: dict[tuple[str, int], Path], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (shared, seed), folder in sorted(folders.items()):
        label = f"shared: {shared}" if seed == 0 else None
        axes.plot(*zip(*curve(folder), strict=True), color=COLORS[shared], alpha=0.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "encodings", help="folder of the runs")
    parser.add_argument("--picture", dest="image", type=Path, default=ROOT / "docs" / "encodings.png")
    options = parser.parse_args()
    folders = {(shared, seed): options.runs / f"{shared}_{seed}" for seed in range(options.seeds) for shared in COLORS}
    for (shared, seed), folder in folders.items():
        train(folder, changes(shared, seed, options.steps))
    losses = summary(folders)
    records.append("training/demo/encodings", steps=options.steps, seeds=options.seeds, last=LAST_STEPS, losses=losses)
    plot(folders, options.image)
    print(json.dumps(losses, indent=1))


if __name__ == "__main__":
    main()
