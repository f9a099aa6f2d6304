"""The ledger of the planned step: forward and backward on fake CUDA tensors, by the path that a GPU takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sclkern.errors import UserError
from sclkern.models.config import SCLConfig
from sclkern.models.network import SCLNetwork
from sclkern.objectives.config import ObjectiveConfig
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.step import StepConfig, take_step
from sclkern.step.fake_cuda import autocast, backward
from sclkern.tools.ledger.counting import Ledger, totals


def trace(
    mode: Any,
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    rows: int,
    num_frames: int = 1,
    caption_tokens: int = 13,
    padded_tokens: int = 18,
    precision: torch.dtype | None = torch.bfloat16,
) -> None:
    """Take a step, forward and backward, on fake CUDA tensors.

    Args:
        mode: dispatch mode that sees the operators; its attribute ``section`` is set to "forward", then "backward".
        config: as of ``measure``.
        objectives: as of ``measure``.
        step: as of ``measure``.
        rows: as of ``measure``.
        num_frames: as of ``measure``.
        caption_tokens: as of ``measure``.
        padded_tokens: as of ``measure``.
        precision: as of ``measure``.
    """
    with FakeTensorMode(), torch.device("cuda"):
        network = SCLNetwork(config).train()
        network.execution.absorb = step.absorb
        network.execution.checkpoint_blocks = step.checkpoint_blocks
        frames = () if num_frames == 1 else (num_frames,)
        image = torch.empty(rows, *frames, 3, config.image_size, config.image_size)
        ids = torch.empty(rows, padded_tokens, dtype=torch.int64)
        mask = torch.empty_like(ids, dtype=torch.bool)
        batch = {"image": image, "text_ids": ids, "text_mask": mask}
        # What training gives, where one process holds the whole global batch.
        place = torch.empty(rows, dtype=torch.int64)
        batch |= {"place": place, "match_labels": place}
        negatives = rows - rows // 2
        false = ("false_image", image) if objectives.dataset_negatives else ("false_place", place)
        batch[false[0]] = false[1][:negatives]
        with mode:
            mode.section = "forward"
            with autocast(precision):
                losses = take_step(network, objectives, step, {**batch, "text_tokens": rows * caption_tokens}, 0)
            mode.section = "backward"
            backward(losses.total)


def measure(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    rows: int,
    num_frames: int = 1,
    caption_tokens: int = 13,
    padded_tokens: int = 18,
    precision: torch.dtype | None = torch.bfloat16,
) -> dict[str, Any]:
    """Count what one step launches, without its optimizer. It takes seconds and no memory.

    Args:
        config: of the network.
        objectives: the recipe.
        step: how it is executed.
        rows: of the batch.
        num_frames: of every clip; 1 for images.
        caption_tokens: of a caption on average.
        padded_tokens: of the longest caption, to which all are padded.
        precision: dtype of autocast, None for float32.

    Returns:
        "forward", "backward" and "step", each with the fields of ``counting.totals`` and "lines": by name of a kernel
        or operator, the fields of ``counting.Line``.

    Raises:
        UserError: Triton is not installed, or interprets.
    """
    if interpreted() or not TRITON_INSTALLED:
        raise UserError("ledger: counts what Triton launches; install triton, and unset TRITON_INTERPRET")
    ledger = Ledger()
    sizes = {"rows": rows, "num_frames": num_frames, "caption_tokens": caption_tokens, "padded_tokens": padded_tokens}
    trace(ledger, config, objectives, step, **sizes, precision=precision)
    ledger.section = "step"
    for name in ("forward", "backward"):
        for key, line in ledger.lines[name].items():
            ledger.add(key, line.kind, line.bytes, launches=line.launches, ours=line.ours)
    return {
        name: {**totals(lines.values()), "lines": {key: asdict(line) for key, line in lines.items()}}
        for name, lines in ledger.lines.items()
    }


def format_ledger(measured: dict[str, Any], names: int = 25) -> str:
    """Format the data of ``measure`` as tables for people.

    Args:
        measured: the data.
        names: kernels and operators that are shown, those that move the most bytes.

    Returns:
        Lines of text.
    """
    lines = [f"{'':10}{'Triton':>8}{'torch':>8}{'GB':>9}{'GB of products and attention':>31}"]
    for name, section in measured.items():
        numbers = section["bytes"] / 1e9, section["arithmetic_bytes"] / 1e9
        lines.append(f"{name:10}{section['triton']:8}{section['torch']:8}{numbers[0]:9.2f}{numbers[1]:31.2f}")
    found = measured["step"]["lines"]
    kinds: dict[str, tuple[int, int]] = {}
    for line in found.values():
        launches, moved = kinds.get(line["kind"], (0, 0))
        kinds[line["kind"]] = launches + line["launches"], moved + line["bytes"]
    lines += ["", f"{'kind':48}{'launches':>9}{'GB':>9}"]
    lines += [_row(kind, *numbers) for kind, numbers in sorted(kinds.items(), key=lambda item: -item[1][1])]
    lines += ["", f"{'kernel or operator':48}{'launches':>9}{'GB':>9}"]
    largest = sorted(found.items(), key=lambda item: -item[1]["bytes"])
    lines += [_row(name, line["launches"], line["bytes"]) for name, line in largest[:names]]
    others = [line for _, line in largest[names:]]
    if others:
        lines.append(
            _row(f"{len(others)} others", *(sum(line[key] for line in others) for key in ("launches", "bytes")))
        )
    return "\n".join(lines)


def _row(name: str, launches: int, moved: int) -> str:
    return f"{name:48}{launches:9}{moved / 1e9:9.3f}"
