"""Sections of a pre-training configuration; the model's, objectives' and step's stand beside what they configure.

Each field's line under ``Attributes`` is also what ``sclkern configs --keys`` prints.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sclkern.errors import UserError


def _check(section: object, holds: Callable[[Any], bool], expected: str, *names: str) -> None:
    """Raise a ``UserError`` that names the first of these fields, None excepted, for which ``holds`` is false.

    A number that is not finite is refused too.
    """
    for name in names:
        value = getattr(section, name)
        finite = not isinstance(value, float) or math.isfinite(value)
        if value is not None and not (finite and holds(value)):
            shown = repr(value) if isinstance(value, str) else value
            raise UserError(f"{name}: got {shown}, expected {expected}")


# A shell does not expand "~" behind "=", and an empty path is the working directory.
_PATH = "a path that is not empty and does not begin with '~', without NUL; write it out"


def _written_out(path: str) -> bool:
    return bool(path.strip()) and not path.startswith("~") and "\0" not in path


def _is_time(value: int | str) -> bool:
    if isinstance(value, int):
        return value >= 0
    with contextlib.suppress(ValueError):
        datetime.fromisoformat(value)
        return len(value) > 10  # with an hour
    return False


@dataclass(frozen=True)
class WeightsConfig:
    """Source of the initial weights; when every source is None, they are random.

    Attributes:
        pretrained: directory written by ``save_pretrained``.
        reference: published SCL or METER checkpoint.
        text: RoBERTa weights (needs ``vision``); fusion layers and heads start random.
        vision: CLIP weights (needs ``text``).
        strict: whether missing or unexpected tensors raise an error that lists them.
    """

    pretrained: str | None = None
    reference: str | None = None
    text: str | None = None
    vision: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        _check(self, _written_out, _PATH, "pretrained", "reference", "text", "vision")
        if (self.text is None) != (self.vision is None):
            raise UserError(f"text, vision: got {self.text!r} and {self.vision!r}, expected both or neither")
        if sum(source is not None for source in (self.pretrained, self.reference, self.text)) > 1:
            raise UserError("pretrained, reference, text + vision: expected one source of weights at most")


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of ``data.sources`` or ``data.val_sources``.

    Attributes:
        tables: names of the files, without their suffix.
        root: folder of the data, or a URL; null is ``data.root``.
        format: data format; null is ``data.format``.
        split: split of the files to read; null reads every row.
        weight: share of the training pairs, relative to the weights of the others.
    """

    tables: tuple[str, ...]
    root: str | None = None
    format: str | None = None
    split: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        _check(self, _written_out, _PATH, "root")
        _check(self, lambda value: value > 0, "a number above 0; leave out a source that gives no pairs", "weight")
        if not self.tables:
            raise UserError("tables: got none, expected the names of files")


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out data.

    Attributes:
        root: folder of the data, local or an fsspec URL; "demo" is the embedded one.
        format: data format, a name of ``sclkern.data.SOURCES`` or ``module:Class``; "auto" looks at ``root``.
        train_tables: names of the files to train on, without their suffix.
        val_tables: names of the held-out files, without their suffix.
        train_split: split of the training files to read; null reads every row.
        val_split: split of the held-out files to read; null reads every row.
        sources: several sources to train on, in place of ``train_tables`` and ``train_split``: a list of
            {tables, root, format, split, weight}, ``root`` null being ``data.root``. With ``weight``, for all or for
            none, a source gives that share of the pairs; without, all pairs are one epoch.
        val_sources: several held-out sources, in place of ``val_tables`` and ``val_split``: a list as ``sources``,
            without ``weight``.
        tokenizer: tokenizer directory or name on the Hugging Face hub; "demo" is the shipped one.
        transform: image transform for training: clip, clip_randaug or clip_test.
        val_transform: image transform for validation and retrieval.
        decoding: "fast" decodes a large JPEG at a part of its size and resizes by torch; "published" decodes in full
            and resizes by Pillow.
        num_frames: frames of a clip that a model takes, at most ``model.max_frames``; images have one.
        frame_sampling: which frames of a clip training reads: "segments" (one at random of each of equal segments),
            "uniform" (from the first to the last) or "midpoint" (the middle of each segment).
        val_frame_sampling: the same of held-out clips; "uniform" and "midpoint" are the published ones.
        normalize: "device" moves images as uint8, a quarter of the bytes, and normalises them where the model is;
            "host" normalises them where they are decoded. Both give the same floats, to the bit.
        num_workers: processes that decode images; 0 decodes in the training process.
    """

    root: str = "demo"
    format: str = "auto"
    train_tables: tuple[str, ...] = ("pairs",)
    val_tables: tuple[str, ...] = ("pairs",)
    train_split: str | None = "train"
    val_split: str | None = "val"
    sources: tuple[SourceConfig, ...] | None = None
    val_sources: tuple[SourceConfig, ...] | None = None
    tokenizer: str = "demo"
    transform: str = "clip"
    val_transform: str = "clip_test"
    decoding: Literal["fast", "published"] = "fast"
    num_frames: int = 4
    frame_sampling: Literal["segments", "uniform", "midpoint"] = "segments"
    val_frame_sampling: Literal["uniform", "midpoint"] = "uniform"
    normalize: Literal["device", "host"] = "device"
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check(self, lambda value: value >= 0, "0 or more", "num_workers")
        _check(self, lambda value: value >= 1, "1 or more", "num_frames")
        _check(self, _written_out, _PATH, "root")
        for name in ("sources", "val_sources"):
            if getattr(self, name) == ():
                raise UserError(f"{name}: got none, expected a list of sources; or null")
        given = [source.weight is not None for source in self.sources or ()]
        if any(given) and not all(given):
            raise UserError(
                f"sources: got a weight for {sum(given)} of {len(given)}, expected one for each or for none; a source "
                "without weight would have no share"
            )
        if not math.isfinite(total := sum(source.weight or 0.0 for source in self.sources or ())):
            raise UserError(
                f"sources: got weights whose sum is {total}, expected a finite sum; make all of them smaller"
            )
        if any(source.weight is not None for source in self.val_sources or ()):
            raise UserError("val_sources: got a weight, expected none, because every held-out pair is read; remove it")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the published parameter groups and schedule (``set_schedule`` in scl_utils.py).

    Attributes:
        learning_rate: peak learning rate of the encoders.
        weight_decay: decoupled weight decay of AdamW.
        betas: decay rates of AdamW's two moments.
        eps: term added to AdamW's denominator.
        warmup: share of the steps over which the rates rise linearly from 0.
        end_factor: factor of the peak rates at the last step.
        decay_power: exponent of the polynomial decay after the warm-up.
        fusion_factor: factor of the rate of the modality transforms, fusion layers and poolers.
        head_factor: factor of the rate of the ITM, MLM, VQA and NLVR2 heads.
        no_decay: parameters without weight decay: "norms_and_biases" also exempts the temperature; "published" decays
            the temperature and the LayerNorms of CLIP and the projections.
        max_grad_norm: limit that the global gradient norm is clipped to; null does not clip.
        name: "adamw" is torch's fused AdamW; "apex" is FusedAdam of NVIDIA's apex (GPU only).
    """

    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: float = 0.1
    end_factor: float = 0.0
    decay_power: float = 1.0
    fusion_factor: float = 5.0
    head_factor: float = 5.0
    no_decay: Literal["norms_and_biases", "published"] = "norms_and_biases"
    max_grad_norm: float | None = None
    name: Literal["adamw", "apex"] = "adamw"

    def __post_init__(self) -> None:
        _check(self, lambda value: value > 0, "a positive number", "learning_rate", "eps", "max_grad_norm")
        _check(self, lambda value: value >= 0, "0 or more", "weight_decay", "end_factor", "decay_power")
        _check(self, lambda value: value >= 0, "0 or more", "fusion_factor", "head_factor")
        _check(self, lambda value: 0 <= value < 1, "a share of the steps, 0 <= warmup < 1", "warmup")
        _check(self, lambda value: all(0 <= beta < 1 for beta in value), "two numbers of [0, 1)", "betas")


@dataclass(frozen=True)
class RunConfig:
    """Length, batch, device, precision and output of a run.

    Attributes:
        output_dir: folder the run writes.
        max_steps: optimiser steps of the whole schedule.
        stop_at: step after which the run saves and stops, with the schedule unchanged; null runs to max_steps.
        stop_before: local time, such as "2026-12-31 08:00", before which the run is saved and has ended; a number is
            seconds before the end of its SLURM job; null is no time.
        batch_size: pairs that one process takes in one forward pass.
        accumulation: forward passes accumulated for one optimiser step.
        contrastive_batch: pairs that ITC, MVSC and MLSC contrast with each other: null takes those of one forward pass
            of all processes; processes x batch_size x accumulation takes the whole batch of a step, in two passes.
        parallel: how the processes of torchrun share the work: "ddp" keeps the whole model in each, "fsdp" keeps a part
            of weights, gradients and optimiser in each.
        preflight_seconds: how long a process waits at the start for all others.
        seed: seed of initial weights, order and augmentation of the data, masks and dropout.
        precision: "float32", or "bfloat16" for autocast with float32 weights.
        device: "cpu", "cuda" or "cuda:N"; "auto" takes a GPU if there is one.
        backend: "triton", "sdpa" or "eager" for every op; "auto" lets each op choose; "flash" is "auto" with the
            attention of flash-attn 2 (GPU only, with precision "bfloat16").
        layer_norm: "sclkern" fuses LayerNorm with what precedes it; "torch" and "apex" take the norm of that library,
            after plain dropout and sum ("apex": GPU only).
        cuda_graphs: whether forward and backward are recorded once for each batch shape and replayed (GPU only).
        log_every: steps between logged steps.
        save_every: steps between checkpoints; 0 saves before validations and at the end only.
        keep: checkpoints that are kept: latest.pt and those before it; best.pt is kept beside them.
        val_every: steps between validations; 0 validates at the end only.
        tracker: "wandb" or "trackio" receives what is logged too; null tracks nothing.
        watchdog_seconds: time without progress after which a process is taken to hang and ends the run; 0 never does.
    """

    output_dir: str = "runs/pretrain"
    max_steps: int = 1000
    stop_at: int | None = None
    stop_before: int | str | None = None
    batch_size: int = 64
    accumulation: int = 1
    contrastive_batch: int | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    preflight_seconds: int = 300
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    backend: Literal["auto", "triton", "sdpa", "flash", "eager"] = "auto"
    layer_norm: Literal["sclkern", "torch", "apex"] = "sclkern"
    cuda_graphs: bool = False
    log_every: int = 10
    save_every: int = 500
    keep: int = 3
    val_every: int = 0
    tracker: Literal["wandb", "trackio"] | None = None
    watchdog_seconds: int = 1200

    def __post_init__(self) -> None:
        counts = ("max_steps", "stop_at", "batch_size", "accumulation", "log_every", "keep", "preflight_seconds")
        _check(self, lambda value: value >= 1, "1 or more", *counts)
        _check(self, lambda value: value >= 2, "2 or more", "contrastive_batch")
        _check(self, lambda value: value >= 0, "0 or more", "seed", "save_every", "val_every", "watchdog_seconds")
        _check(self, _written_out, _PATH, "output_dir")
        _check(self, _is_time, "a local time such as '2026-12-31 08:00', or 0 or more seconds", "stop_before")


@dataclass(frozen=True)
class EvaluationConfig:
    """Retrieval during validation and the plots of the report.

    Attributes:
        batch_size: images or captions encoded at a time.
        rerank: candidates of ITC that ITM re-ranks, in each direction; 0 does not re-rank.
        images: held-out images, or clips, that retrieval takes at most, spread evenly over them.
        train_images: training images that the final report retrieves from; 0 leaves the training set out.
        attention_images: held-out images in attention.png, 100 at most; 0 writes no such file.
    """

    batch_size: int = 64
    rerank: int = 16
    images: int = 5000
    train_images: int = 1000
    attention_images: int = 6

    def __post_init__(self) -> None:
        _check(self, lambda value: value >= 1, "1 or more", "batch_size", "images")
        _check(self, lambda value: value >= 0, "0 or more", "rerank", "train_images")
        # A figure of more rows would pass the pixels that a plot may have, at the end of the run.
        _check(self, lambda value: 0 <= value <= 100, "0 to 100", "attention_images")
