"""The evaluation of a model on a split of a task, as ``sclkern evaluate`` makes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.errors import UserError
from sclkern.tasks.answering import Answering
from sclkern.tasks.config import FinetuneConfig, load_finetune, model_folder
from sclkern.tasks.finetuning import TASK_FILE
from sclkern.tasks.results import UNKNOWN, ZERO_SHOT, describe
from sclkern.tasks.task import Outcome, Task
from sclkern.training.config import build_as
from sclkern.training.data import check_tokenizer
from sclkern.training.world import World
from sclkern.weights.pretrained import stored_config


def load_evaluation(
    task: Task, checkpoint: str | Path, data: str | Path, overrides: Sequence[str] = ()
) -> FinetuneConfig:
    """The configuration by which a model is evaluated: that which it was fine-tuned with.

    Args:
        task: to evaluate.
        checkpoint: folder of a fine-tuned model, or of its run.
        data: folder of the tables.
        overrides: ``section.key=value`` each, such as ``task.evaluation_batch=256``.

    Returns:
        The configuration.

    Raises:
        UserError: no such model, or one of another task.
    """
    folder = model_folder(checkpoint)
    recipes, recipe = dict(task.recipes), "default"
    if (folder / TASK_FILE).is_file():
        try:
            saved = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
            name, trained = saved["task"], build_as(FinetuneConfig, saved["config"]).to_dict()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / TASK_FILE}: cannot be read ({error}); fine-tune again") from error
        if name != task.name:
            raise UserError(
                f"--checkpoint: {folder} is fine-tuned for {name}, expected {task.name}; evaluate {name}, or give "
                "another folder"
            )
        # The device is that of this machine, and the model that of the folder.
        run = {key: value for key, value in trained["run"].items() if key in ("seed", "precision", "backend")}
        own = ["root", "tokenizer"]
        if "num_frames" not in task.recipes["default"]["data"]:
            # Of pictures, whose model needs no more temporal positions than it has.
            own.append("num_frames")
        read = {key: value for key, value in trained["data"].items() if key not in own}
        recipe = trained["task"]["recipe"]
        recipes[recipe] = {"data": read, "run": run, "task": trained["task"]}
    overrides = [*overrides, f"data.root={data}"]
    return load_finetune(task.name, recipes, task.heads, recipe=recipe, checkpoint=checkpoint, overrides=overrides)


def evaluate(
    task: Task,
    config: FinetuneConfig,
    *,
    split: str = "val",
    annotations: Path | None = None,
    scored: bool = True,
    world: World | None = None,
    device: torch.device | str = "cpu",
) -> Outcome:
    """Evaluate a model.

    Args:
        task: to evaluate.
        config: of ``load_evaluation``.
        split: of the task; "val" are the tables that the model was selected by.
        annotations: as in ``Task.evaluate``.
        scored: whether metrics are wanted; else answers are enough.
        world: the processes; None is this one.
        device: of the model.

    Returns:
        What was found, the same on every rank and for any number of them; with ``about``.

    Raises:
        UserError: the model has no head of the task or answers by other classes, no such split, or one without answers
            although it is to be ``scored``.
    """
    if split not in task.splits and split != "val":
        raise UserError(f"--split: got {split!r}, expected one of {', '.join(task.splits)}")
    assert config.weights.pretrained is not None
    folder, device = Path(config.weights.pretrained), torch.device(device)
    stored = stored_config(folder / "config.json")
    lacking = [head for head in task.heads if head not in stored.heads]
    if lacking and not (task.zero_shot and set(task.zero_shot) <= set(stored.heads)):
        raise UserError(
            f"--checkpoint: {folder} has no head {lacking[0]!r} (it has {', '.join(stored.heads) or 'none'}), expected "
            f"a model of sclkern finetune {task.name}"
        )
    tables = config.data.val_tables if split == "val" else task.splits[split]
    source = task.open(config.data.root, tables)
    task.check_model(source, folder, stored)
    tokenizer = CaptionTokenizer.from_pretrained(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    if scored and not task.answered(source):
        raise UserError(
            f"--split: {split} has no answers to score, expected one that has, such as val; with --output FOLDER its "
            "answers are written for the task's server"
        )
    config = replace(config, model=config.model.replace(**task.sizes(source)))
    model = task.model.from_pretrained(folder, config=config.model)
    model.set_backend(config.run.backend).to(device).eval()
    answering = Answering(task, config, tokenizer, world or World(), device)
    outcome = task.evaluate(source, model, answering, annotations=annotations)
    recipe = config.task.recipe if (folder / TASK_FILE).is_file() else UNKNOWN
    return outcome._replace(about=describe(task, config, source, tables, ZERO_SHOT if lacking else recipe))
