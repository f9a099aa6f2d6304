"""Configuration of a pre-training run: typed sections, read from YAML, overridden on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import pydantic

from sclkern.errors import UserError
from sclkern.legacy import translate_config
from sclkern.models.config import PRESETS, SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.config import StepConfig
from sclkern.training.config_yaml import read_value, read_yaml
from sclkern.training.sections import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    WeightsConfig,
)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that defines a run. ``model`` may name a ``preset`` in YAML; its other keys override the preset.

    Attributes:
        unread: sections that a subclass does not read, so that no file has them.
        model: architecture.
        weights: source of the initial weights.
        objectives: losses and their options.
        step: how a step is executed.
        data: training and held-out data.
        optimizer: AdamW and its schedule.
        run: length, batch, device, precision and output.
        evaluation: retrieval and the plots of the report.
    """

    unread: ClassVar[tuple[str, ...]] = ()

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
        return {name: _plain(section) for name, section in dataclasses.asdict(self).items() if name not in self.unread}


ConfigT = TypeVar("ConfigT", bound=PretrainConfig)

# Keys that may change when a run is resumed. None of them changes what is computed, except the learning rate and the
# gradient clipping, which are the remedies for a run that diverged. The best checkpoint is chosen by recalls after
# re-ranking, so evaluation.rerank is not among them. Of the factors of a step's batch,
# ``batch_difference`` compares the product.
RESUMABLE_CHANGES = {
    "optimizer.learning_rate", "optimizer.max_grad_norm", "run.output_dir",
    "run.batch_size", "run.accumulation", "run.parallel", "run.preflight_seconds",
    "run.stop_at", "run.device", "run.cuda_graphs",
    "run.log_every", "run.tracker", "run.save_every", "run.keep", "run.val_every",
    "run.stop_before", "run.watchdog_seconds",
    "data.format", "data.normalize", "data.num_workers",
    "weights.pretrained", "weights.reference", "weights.text", "weights.vision", "weights.strict",
    "evaluation.batch_size", "evaluation.train_images", "evaluation.attention_images",
}  # fmt: skip


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a YAML file, apply the overrides and check everything.

    Args:
        path: YAML file with sections such as ``model:`` and ``run:``, read as ``config_yaml`` describes; None takes
            every default.
        overrides: ``section.key=value`` each, the value in YAML; they win over the file.

    Returns:
        The whole configuration, with defaults for the keys that are not given.

    Raises:
        UserError: unreadable file, unknown key (the message names the nearest one), a key given twice, wrong type or
            value.
    """
    return build_config(read_values(path, overrides))


def read_values(path: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply the overrides, of which nothing but the form is checked.

    Args:
        path: as in ``load_config``.
        overrides: as in ``load_config``.

    Returns:
        What ``build_config`` takes.

    Raises:
        UserError: unreadable file, a key given twice, or an override that is no ``section.key=value``.
    """
    values = {} if path is None else _read_file(Path(path))
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or len(parts) != 2 or not all(parts):
            raise UserError(f"override {override!r}: expected section.key=value, such as run.max_steps=100")
        if key in given:
            raise UserError(f"override {override!r}: {key} is given twice, before as {given[key]!r}; keep one of them")
        given[key] = text
        section = {} if values.get(parts[0]) is None else values[parts[0]]
        if not isinstance(section, dict):
            raise UserError(f"{parts[0]}: got {section!r}, expected a section with keys")
        try:
            values[parts[0]] = {**section, parts[1]: read_value(text)}
        except UserError as error:
            raise UserError(f"override {override!r}: {error}") from error
    return values


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not UTF-8 text ({error}); give the path of a YAML file") from error
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error
    if values is None:  # all commented out
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config {path}: got a {type(values).__name__}, expected sections such as 'model:' and 'run:'")
    return values


def build_config(values: dict[str, Any]) -> PretrainConfig:
    """``build_as`` of the configuration of a pre-training."""
    return build_as(PretrainConfig, values)


def build_as(kind: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Check plain values and build a configuration.

    Args:
        kind: class of the configuration.
        values: section name -> key -> value, as YAML gives them. No type is converted, except an integer to a float.

    Returns:
        The whole configuration, with defaults for the keys that are not given.

    Raises:
        UserError: unknown key (the message names the nearest one), wrong type or value, a number that is not finite.
    """
    hints = get_type_hints(kind)
    sections = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.name not in kind.unread}
    _check_keys("", values, sections)
    values = {name: {} if section is None else section for name, section in translate_config(values).items()}
    for name, section in values.items():
        if not isinstance(section, dict):
            raise UserError(f"{name}: got {section!r}, expected a section with keys")
        known = [f.name for f in dataclasses.fields(sections[name])] + ["preset"] * (name == "model")
        _check_keys(name + ".", section, known)
        for key, value in section.items():
            _check_plain(f"{name}.{key}", value)
    for name in ("sources", "val_sources"):
        sources = values.get("data", {}).get(name)
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            if not isinstance(source, dict):
                raise UserError(
                    f"data.{name}.{number}: got {source!r}, expected a source with keys, such as {{tables: [train]}}"
                )
            _check_keys(f"data.{name}.{number}.", source, [f.name for f in dataclasses.fields(SourceConfig)])
    preset = values.get("model", {}).get("preset")
    if preset is not None:
        if not isinstance(preset, str):
            raise UserError(f"model.preset: got {preset!r}, expected a name")
        given = {k: v for k, v in values["model"].items() if k != "preset"}
        values["model"] = {**dataclasses.asdict(SCLConfig.preset(preset)), **given}
    try:
        # As JSON, because pydantic is strict about the types of plain values only there; otherwise true is the number 1
        # and "no" is false.
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            raise UserError(f"{where}.{cause}") from error
        problem = _PROBLEMS.get(first["type"], first["msg"])
        raise UserError(f"{where}: got {first['input']!r}; {problem}") from error


_PROBLEMS = {
    "tuple_type": "Input should be a list, such as [a, b]",
    "bool_type": "Input should be true or false",
    "string_type": "Input should be a text; put it in quotes",
}


def resume_difference(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """Find the first changed key that would make a resumed run another run.

    Args:
        saved: ``PretrainConfig.to_dict()`` of the run.
        current: the same of the configuration it is resumed with.

    Returns:
        The key with both values, in one line; None if the run can be resumed.
    """
    saved = translate_config(saved)
    for section, keys in current.items():
        for key, value in keys.items():
            before = saved.get(section, {}).get(key)
            if before != value and f"{section}.{key}" not in RESUMABLE_CHANGES:
                if key not in ("sources", "val_sources") or not before or not value or len(before) != len(value):
                    return f"{section}.{key} was {before!r} and is now {value!r}"
                for number, (old, new) in enumerate(zip(before, value, strict=True)):
                    for name in new:
                        if old.get(name) != new[name] and f"{section}.{name}" not in RESUMABLE_CHANGES:
                            was = f"{section}.{key}.{number}.{name} was {old.get(name)!r}"
                            return f"{was} and is now {new[name]!r}"
    return None


def batch_difference(global_batch: int, config: PretrainConfig, world_size: int) -> str | None:
    """Compare the batch of a step with that of the run that is resumed.

    Args:
        global_batch: pairs of a step of the run, over all processes and micro-batches.
        config: that it is resumed with.
        world_size: processes that it is resumed with.

    Returns:
        The difference in one line, with the remedy; None if there is none.
    """
    run, rows = config.run, world_size * config.run.batch_size
    if global_batch == rows * run.accumulation:
        return None
    if global_batch % rows == 0:
        remedy = f"set run.accumulation={global_batch // rows}"
    elif global_batch % world_size == 0:
        remedy = f"set run.batch_size and run.accumulation to factors of {global_batch // world_size}"
    else:
        remedy = f"start a number of processes that divides {global_batch}"
    return (
        f"a step had {global_batch} pairs and has now {rows * run.accumulation}, of {world_size} processes x "
        f"run.batch_size {run.batch_size} x run.accumulation {run.accumulation}; {remedy}"
    )


@dataclass(frozen=True)
class ConfigKey:
    """One key of the configuration, described.

    Attributes:
        name: section and key, such as "run.batch_size".
        default: its value where nothing is given, as YAML holds it.
        meaning: what it sets, in one line.
    """

    name: str
    default: Any
    meaning: str


def config_keys() -> list[ConfigKey]:
    """Every key with its default and its line in the ``Attributes`` of its section's docstring, section by section."""
    keys = []
    hints = get_type_hints(PretrainConfig)
    for section, kind in ((f.name, hints[f.name]) for f in dataclasses.fields(PretrainConfig)):
        defaults, meanings = _plain(dataclasses.asdict(kind())), _attributes(kind)
        if section == "model":
            names = ", ".join(PRESETS)
            meaning = f"name of a size ({names}), whose values the other keys of this section override."
            keys.append(ConfigKey("model.preset", None, meaning))
        keys += [ConfigKey(f"{section}.{name}", value, meanings.get(name, "")) for name, value in defaults.items()]
    return keys


def _attributes(kind: type) -> dict[str, str]:
    """Name -> text of the entries below ``Attributes:`` in a docstring; continued lines are joined."""
    _, _, text = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def _check_keys(prefix: str, values: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise UserError(f"config: unknown key '{prefix}{key}'; {hint}")


def _check_plain(name: str, value: Any) -> None:
    """Raise a ``UserError`` unless this is what YAML can hold, with finite numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: got {value}, expected a finite number")
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(name, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(f"{name}.{key}", item)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(f"{name}: got {value!r}, expected a number, a text, true, false, null or a list")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
