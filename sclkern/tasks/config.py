"""Configuration of a fine-tuning run: the sections of pre-training, and what a task has of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from sclkern.errors import UserError
from sclkern.models.config import SCLConfig
from sclkern.training.config import PretrainConfig, build_as, read_values
from sclkern.training.sections import DataConfig, WeightsConfig
from sclkern.weights.pretrained import stored_config

# What of a checkpoint's model may be another in fine-tuning; all else is what its weights are made for.
CHANGEABLE = ("image_size", "max_frames", "image_temporal", "max_text_len", "dropout")
# Keys of the data of pre-training that no task reads.
UNREAD_DATA = ("format", "train_split", "val_split", "sources", "val_sources")


@dataclass(frozen=True)
class TaskConfig:
    """What a task adds to the configuration of a run.

    Attributes:
        name: of the task.
        recipe: from which the values come that are not given: "default" or "published".
        epochs: passes over the training samples, which set run.max_steps; null takes run.max_steps as it is.
        val_epochs: passes between validations, which set run.val_every; null takes run.val_every as it is.
        global_batch: samples of a step over all processes, which set run.accumulation; null takes run.accumulation.
        evaluation_batch: samples that one process answers at a time in validation and evaluation.
        rerank: candidates of the contrast that the ranking head orders for each query of a retrieval; null orders all.
    """

    name: str = ""
    recipe: str = "default"
    epochs: float | None = 10.0
    val_epochs: float | None = 1.0
    global_batch: int | None = None
    evaluation_batch: int = 64
    rerank: int | None = 128

    def __post_init__(self) -> None:
        for name, least in (("global_batch", 1), ("evaluation_batch", 1), ("rerank", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: got {value}, expected {least} or more")
        for name in ("epochs", "val_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}: got {value}, expected a positive number, or null")


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """Everything that defines a fine-tuning run. Its model is that of a checkpoint, with the heads of the task.

    Attributes:
        unread: sections of pre-training that do not exist here.
        weights: the checkpoint; its heads of other tasks are left out.
        data: tables of the task.
        task: what is fine-tuned.
    """

    unread: ClassVar[tuple[str, ...]] = ("objectives", "evaluation")

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


def load_finetune(
    name: str,
    recipes: Mapping[str, Mapping[str, Mapping[str, Any]]],
    heads: Sequence[str],
    *,
    recipe: str = "default",
    checkpoint: str | Path | None = None,
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> FinetuneConfig:
    """Read a YAML file, apply the overrides, and take what is not given from the recipe and the checkpoint.

    Args:
        name: of the task.
        recipes: of the task, by name: section -> key -> value.
        heads: of the task.
        recipe: one of them.
        checkpoint: folder of ``save_pretrained``, or of a run, whose ``model/`` is taken; None leaves it to
            ``weights.reference``.
        path: YAML file; None reads none.
        overrides: ``section.key=value`` each; they win over the file.

    Returns:
        The configuration. Numbers that depend on the data are those of the recipe still.

    Raises:
        UserError: as ``load_config``; an unknown recipe, no checkpoint, or a model that is not the checkpoint's.
    """
    if recipe not in recipes:
        raise UserError(f"--recipe: got {recipe!r}, expected one of {', '.join(recipes)}")
    given = read_values(path, overrides)
    values: dict[str, Any] = {}
    for section in {**recipes[recipe], **given}:
        own = given.get(section)
        if own is not None and not isinstance(own, dict):
            raise UserError(f"{section}: got {own!r}, expected a section with keys")
        values[section] = {**recipes[recipe].get(section, {}), **(own or {})}
    own_data = given.get("data") or {}
    if unread := [key for key in UNREAD_DATA if key in own_data]:
        raise UserError(
            f"data.{unread[0]}: got {own_data[unread[0]]!r}, but a task reads every row of the arrow files "
            "data.train_tables and data.val_tables; leave it out"
        )
    weights, data = values.setdefault("weights", {}), values.setdefault("data", {})
    data |= {"train_split": None, "val_split": None}
    if checkpoint is not None:
        if sources := [key for key in ("pretrained", "reference", "text", "vision") if weights.get(key)]:
            raise UserError(f"--checkpoint: got {str(checkpoint)!r} and weights.{sources[0]}; give one of them")
        weights["pretrained"] = str(model_folder(checkpoint))
    source = weights.get("pretrained")
    if source is None and weights.get("reference") is None:
        raise UserError("--checkpoint: got none, expected the folder of a pre-trained model or of a run; name it")
    if "tokenizer" not in data:
        if source is None or not (Path(source) / "tokenizer.json").is_file():
            raise UserError(
                f"data.tokenizer: got none, and {source or 'a published checkpoint'} has no tokenizer.json; give the "
                "tokenizer that the model was trained with, such as roberta-base"
            )
        data["tokenizer"] = str(source)
    model = values.get("model", {})
    if source is not None:
        wanted = given.get("model") or {}
        model = {**_model_of(Path(source), wanted), **{key: model[key] for key in model if key in CHANGEABLE}}
        frames = data.get("num_frames", 1)
        if frames > 1 and model["max_frames"] < frames:
            if "max_frames" in wanted:
                raise UserError(
                    f"model.max_frames: got {model['max_frames']}, expected at least data.num_frames {frames}; raise it"
                )
            model["max_frames"] = frames
    # A task replaces no patches; the second image of NLVR2 has a type of its own.
    model |= {"heads": list(heads), "patch_mask_token": False, "token_types": 3 if "nlvr2" in heads else 2}
    values["model"] = model
    task = values.setdefault("task", {})
    for key, own in (("name", name), ("recipe", recipe)):
        if task.setdefault(key, own) != own:
            raise UserError(f"task.{key}: got {task[key]!r}, the command line has {own!r}; leave it out")
    return build_as(FinetuneConfig, values)


def model_folder(checkpoint: str | Path) -> Path:
    """The folder of ``save_pretrained`` that a command line means.

    Args:
        checkpoint: that folder, or the folder of a finished run.

    Returns:
        The folder.

    Raises:
        UserError: neither.
    """
    folder = Path(checkpoint)
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return place
    has = "is no folder"
    if folder.is_dir():
        has = "is a run without a model yet" if (folder / "checkpoints").is_dir() else "has no config.json"
    raise UserError(
        f"--checkpoint: {folder} {has}, expected a folder with config.json and model.safetensors, or a run that has "
        "ended; sclkern export writes the model of a checkpoint, sclkern convert that of a published one"
    )


def _model_of(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a checkpoint; raises where another one is wanted."""
    stored = stored_config(folder / "config.json")
    if wanted.get("preset") is not None:
        wanted = {**dataclasses.asdict(SCLConfig.preset(wanted["preset"])), **wanted}
    for key, value in wanted.items():
        if hasattr(stored, key) and key not in CHANGEABLE and key != "heads" and value != getattr(stored, key):
            raise UserError(
                f"model.{key}: got {value!r}, the checkpoint {folder} has {getattr(stored, key)!r}; leave it out, or "
                "take another checkpoint"
            )
    unknown = {key: value for key, value in wanted.items() if key != "preset" and not hasattr(stored, key)}
    return {**dataclasses.asdict(stored), **unknown}
