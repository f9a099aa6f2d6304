"""Configuration of a pre-training run: typed sections, read from YAML, overridden on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from sclkern.errors import UserError
from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.config import StepConfig


def _check(section: object, holds: Callable[[Any], bool], expected: str, *names: str) -> None:
    """Raise a ``UserError`` that names the first of these fields, None excepted, for which ``holds`` is false."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not holds(value):
            raise UserError(f"{name}: got {value}, expected {expected}")


@dataclass(frozen=True)
class WeightsConfig:
    """Where the weights start; all None = random.

    Attributes:
        pretrained: directory of ``save_pretrained``. reference: a published SCL or METER checkpoint.
        text, vision: RoBERTa and CLIP sources, given together; fusion and heads start random.
        strict: whether missing or extra tensors are an error.
    """

    pretrained: str | None = None
    reference: str | None = None
    text: str | None = None
    vision: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if (self.text is None) != (self.vision is None):
            raise UserError(f"text, vision: got {self.text!r} and {self.vision!r}, expected both or neither")
        if sum(source is not None for source in (self.pretrained, self.reference, self.text)) > 1:
            raise UserError("pretrained, reference, text + vision: expected one source of weights at most")


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    Attributes:
        root: folder of arrow files; "demo" is the embedded data.
        train_tables, val_tables: names of arrow files without ".arrow".
        train_split, val_split: value of the split column, None = every row.
        tokenizer: a tokenizer directory; "demo" is the shipped one.
        transform, val_transform: names of ``sclkern.data.transforms.build_transform``.
        num_workers: decoding processes; 0 decodes in the training process.
    """

    root: str = "demo"
    train_tables: tuple[str, ...] = ("pairs",)
    val_tables: tuple[str, ...] = ("pairs",)
    train_split: str | None = "train"
    val_split: str | None = "val"
    tokenizer: str = "demo"
    transform: str = "clip"
    val_transform: str = "clip_test"
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check(self, lambda value: value >= 0, "0 or more", "num_workers")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the reference's groups and schedule (scl_utils.py set_schedule).

    Attributes:
        warmup: share of the steps with linearly rising rates; then polynomial decay to ``end_factor`` of the peak.
        fusion_factor: multiplies the rate of the modality transforms, fusion layers and poolers.
        head_factor: multiplies the rate of the ITM, MLM, VQA and NLVR2 heads.
        no_decay: what is not decayed: "norms_and_biases" and the temperature; "reference" misses CLIP's and the
            projections' LayerNorms and decays the temperature.
        max_grad_norm: clip the global gradient norm; None = do not.
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
    no_decay: Literal["norms_and_biases", "reference"] = "norms_and_biases"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        _check(self, lambda value: value > 0, "a positive number", "learning_rate", "eps", "max_grad_norm")
        _check(self, lambda value: value >= 0, "0 or more", "weight_decay", "end_factor", "decay_power")
        _check(self, lambda value: value >= 0, "0 or more", "fusion_factor", "head_factor")
        _check(self, lambda value: 0 <= value < 1, "a share of the steps, 0 <= warmup < 1", "warmup")
        _check(self, lambda value: all(0 <= beta < 1 for beta in value), "two numbers of [0, 1)", "betas")


@dataclass(frozen=True)
class RunConfig:
    """How long, how often, where to.

    Attributes:
        output_dir: run folder. max_steps: optimiser steps of the schedule.
        stop_at: save and stop after this step, the schedule unchanged; None = max_steps.
        batch_size: pairs a process takes at a time; accumulation: of them for one optimiser step.
        precision: "float32", or "bfloat16" by autocast with float32 weights.
        device: "auto" takes a GPU when there is one. backend: see ``SCLModel.set_backend``.
        cuda_graphs: record forward and backward once for each shape of batch and replay them, on a GPU
            (``sclkern.step.cuda_graph``).
        log_every, save_every, val_every: in steps; 0 = at the end alone (validation and saving).
    """

    output_dir: str = "runs/pretrain"
    max_steps: int = 1000
    stop_at: int | None = None
    batch_size: int = 64
    accumulation: int = 1
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    backend: Literal["auto", "triton", "sdpa", "eager"] = "auto"
    cuda_graphs: bool = False
    log_every: int = 10
    save_every: int = 500
    val_every: int = 0

    def __post_init__(self) -> None:
        counts = ("max_steps", "stop_at", "batch_size", "accumulation", "log_every")
        _check(self, lambda value: value >= 1, "1 or more", *counts)
        _check(self, lambda value: value >= 0, "0 or more", "seed", "save_every", "val_every")


@dataclass(frozen=True)
class EvaluationConfig:
    """Retrieval and pictures of the report.

    Attributes:
        rerank: candidates by ITC that ITM re-ranks, in each direction; 0 = none.
        train_images: pictures of the training set the final report retrieves from; 0 = none.
        attention_images: held-out pictures in attention.png; 0 = no picture.
    """

    batch_size: int = 64
    rerank: int = 16
    train_images: int = 1000
    attention_images: int = 6

    def __post_init__(self) -> None:
        _check(self, lambda value: value >= 1, "1 or more", "batch_size")
        _check(self, lambda value: value >= 0, "0 or more", "rerank", "train_images", "attention_images")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that defines a run. ``model`` may name a ``preset`` in YAML; its other keys override it."""

    model: SCLConfig = field(default_factory=SCLConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    objectives: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    step: StepConfig = field(default_factory=StepConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (tuples as lists), what YAML and JSON hold."""
        return _plain(dataclasses.asdict(self))


# What may differ when a run is resumed: none of it changes what is computed, but for the learning rate and the clipping
# of gradients, the remedies for a run that diverged.
RESUMABLE_CHANGES = {
    "optimizer.learning_rate", "optimizer.max_grad_norm", "run.output_dir",
    "run.stop_at", "run.device", "run.cuda_graphs", "run.log_every", "run.save_every", "run.val_every",
    "data.num_workers", "weights.pretrained", "weights.reference", "weights.text", "weights.vision", "weights.strict",
    *(f"evaluation.{f.name}" for f in dataclasses.fields(EvaluationConfig)),
}  # fmt: skip


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a YAML file, apply ``section.key=value`` overrides (values are YAML), check everything.

    Raises:
        UserError: unreadable file, unknown key (names the nearest), wrong type or value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise UserError(f"config {path}: {error.strerror}; give the path of a YAML file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path}: got a {type(values).__name__}, expected sections such as 'model:' and 'run:'")
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or len(parts) != 2 or not all(parts):
            raise UserError(f"override {override!r}: expected section.key=value, such as run.max_steps=100")
        section = values.setdefault(parts[0], {})
        if not isinstance(section, dict):
            raise UserError(f"{parts[0]}: got {section!r}, expected a section with keys")
        try:
            section[parts[1]] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: the value is not YAML") from error
    return build_config(values)


def build_config(values: dict[str, Any]) -> PretrainConfig:
    """Check plain values and build the config; errors as in ``load_config``."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(PretrainConfig)}
    _known_keys("", values, sections)
    values = {name: {} if section is None else section for name, section in values.items()}
    for name, section in values.items():
        if not isinstance(section, dict):
            raise UserError(f"{name}: got {section!r}, expected a section with keys")
        known = [f.name for f in dataclasses.fields(sections[name])] + ["preset"] * (name == "model")
        _known_keys(name + ".", section, known)
    preset = values.get("model", {}).get("preset")
    if preset is not None:
        if not isinstance(preset, str):
            raise UserError(f"model.preset: got {preset!r}, expected a name")
        given = {k: v for k, v in values["model"].items() if k != "preset"}
        values["model"] = {**dataclasses.asdict(SCLConfig.preset(preset)), **given}
    try:
        return pydantic.TypeAdapter(PretrainConfig).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            raise UserError(f"{where}.{cause}") from error
        told = "Input should be a list, such as [a, b]" if first["type"] == "tuple_type" else first["msg"]
        raise UserError(f"{where}: got {first['input']!r}; {told}") from error


def resume_difference(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """The first key whose change would make a resumed run another run, as one line; None if there is none."""
    for section, keys in current.items():
        for key, value in keys.items():
            before = saved.get(section, {}).get(key)
            if before != value and f"{section}.{key}" not in RESUMABLE_CHANGES:
                return f"{section}.{key} was {before!r} and is now {value!r}"
    return None


def _known_keys(prefix: str, values: dict[str, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), 1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise UserError(f"config: unknown key '{prefix}{key}'; {hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
