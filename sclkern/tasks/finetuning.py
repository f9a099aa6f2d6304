"""Fine-tuning on a task, by the loop of pre-training: the same steps, checkpoints, processes and failures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.errors import UserError
from sclkern.tasks.answering import Answering
from sclkern.tasks.batches import TaskLoader
from sclkern.tasks.config import FinetuneConfig
from sclkern.tasks.model import TaskModel
from sclkern.tasks.results import describe, write_json, write_results
from sclkern.tasks.task import Outcome, Task, TaskSource
from sclkern.training.checkpoint import best_folders
from sclkern.training.data import check_tokenizer
from sclkern.training.directory import read_newest
from sclkern.training.logs import read_metrics
from sclkern.training.loop import Training
from sclkern.training.signals import StopSignals
from sclkern.training.validation import Measured, Validation
from sclkern.training.world import World
from sclkern.weights.pretrained import stored_config

# Beside a fine-tuned model: the task, and the configuration it was trained with.
TASK_FILE = "task.json"


@dataclass(frozen=True)
class TaskData:
    """What a fine-tuning run trains and validates on.

    Attributes:
        train_source: samples to train on.
        val_source: samples to select the best model by.
        tokenizer: of the model.
        train_loader: this rank's batches.
        identity: what a resumed run must find again.
    """

    train_source: TaskSource
    val_source: TaskSource
    tokenizer: CaptionTokenizer
    train_loader: TaskLoader
    identity: dict[str, Any]

    @property
    def num_train_images(self) -> int:
        """Pictures to train on."""
        return self.train_source.num_images


class Finetuning(Training):
    """One run of a task; its other arguments are those of ``Training``.

    Args:
        task: what is trained.
        config: of ``load_finetune``.
        resume: as in ``Training``.
        stop: as in ``Training``.
        world: as in ``Training``.

    Attributes:
        config: with the numbers that follow from the data.
        data: of the run.

    Raises:
        UserError: the configuration, the data or the folder cannot work.
    """

    config: FinetuneConfig
    data: TaskData

    def __init__(
        self,
        task: Task,
        config: FinetuneConfig,
        *,
        resume: bool = False,
        stop: StopSignals | None = None,
        world: World | None = None,
    ) -> None:
        self.task = task
        data = config.data
        self._sources = tuple(task.open(data.root, tables) for tables in (data.train_tables, data.val_tables))
        task.check_training(self._sources[0])
        size = 1 if world is None else world.size
        super().__init__(resolve(task, config, self._sources[0], size), resume=resume, stop=stop, world=world)

    def check(self) -> None:
        """Raise a ``UserError`` for what only pre-training can do."""
        run = self.config.run
        if run.cuda_graphs or run.contrastive_batch is not None:
            name = "run.cuda_graphs" if run.cuda_graphs else "run.contrastive_batch"
            default = "false" if run.cuda_graphs else "null"
            raise UserError(f"{name}: got another value than {default}, which only pre-training takes; leave it out")
        if not self.task.answered(self._sources[1]):
            raise UserError(
                f"data.val_tables: {', '.join(self.config.data.val_tables)} have no answers, expected tables that the "
                "best model can be chosen by; name others"
            )
        rows = self.world.size * run.batch_size
        if rows > self._sources[0].num_samples:
            raise UserError(
                f"run.batch_size: got {run.batch_size} on {self.world.size} processes, expected at most the "
                f"{self._sources[0].num_samples} samples of training together; make it smaller"
            )

    def open_data(self) -> TaskData:
        """The tables that ``config.data`` names."""
        config, (train, val) = self.config, self._sources
        tokenizer = CaptionTokenizer.from_pretrained(config.data.tokenizer)
        check_tokenizer(config, tokenizer)
        self.answering = Answering(self.task, config, tokenizer, self.world, self.device, self.stop.check)
        loader = TaskLoader(
            self.answering.batches(train, training=True),
            batch_size=config.run.batch_size,
            seed=config.run.seed,
            num_workers=config.data.num_workers,
            rank=self.world.rank,
            world_size=self.world.size,
            accumulation=config.run.accumulation,
        )
        vocabulary = json.dumps(sorted(tokenizer.tokenizer.get_vocab().items()))
        identity = {
            "training data": _identity_of(train),
            "held-out data": _identity_of(val),
            "tokenizer": hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest(),
        }
        told = self.world.gather(identity)
        if different := [rank for rank, other in enumerate(told) if other != told[0]]:
            raise UserError(f"data: rank {different[0]} has other data than rank 0; copy the files again")
        return TaskData(train, val, tokenizer, loader, identity)

    def build_model(self, *, initial: bool) -> TaskModel:
        """The checkpoint's model with the head of the task."""
        config, weights = self.config, self.config.weights
        if not initial:
            return self.task.model(config.model)
        if weights.pretrained is not None:
            return self.task.model.from_pretrained(weights.pretrained, config=config.model, strict=weights.strict)
        assert weights.reference is not None
        return self.task.model.from_reference(weights.reference, config=config.model, strict=weights.strict)

    def prepare(self) -> None:
        """Set what measures the model."""
        self.validation = Validation(self.config, self.state, self.passes, self, self.keeper, self.stop)

    def measure(self) -> Measured:
        """The metrics of the tables that the best model is chosen by."""
        outcome = self._evaluate()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in outcome.values.items())
        return Measured(outcome.values, outcome.values[self.task.metric], shown)

    def _evaluate(self) -> Outcome:
        model = self.passes.model
        assert isinstance(model, TaskModel)
        return self.task.evaluate(self.data.val_source, model, self.answering)

    def describe(self) -> str:
        """The run in one line."""
        run, train, val = self.config.run, self.data.train_source, self.data.val_source
        loader = self.data.train_loader
        parameters = sum(p.numel() for p in self.model.parameters())
        factors = f"{run.batch_size} x {run.accumulation}"
        if self.world.size > 1:
            factors = f"{self.world.size} processes x {factors} = {loader.order.global_batch}"
        return (
            f"{self.task.title}, recipe {self.config.task.recipe}: {parameters / 1e6:.1f} M parameters, "
            f"{train.num_samples} samples to train on, {val.num_samples} held out; batch {factors}; {run.max_steps} "
            f"steps = {run.max_steps / loader.order.steps_per_epoch:.1f} epochs on {self.device}, {run.precision}"
        )

    def image_name(self, batch: Mapping[str, Any], pair: int) -> str:
        """The name of the first picture of a training sample."""
        source = self.data.train_source
        return source.image_name(self.task.sample(source, pair).images[0])

    @property
    def loss_names(self) -> tuple[str, ...]:
        """``total`` alone: a task has one loss."""
        return ("total",)

    def rates(self, pairs_per_second: float) -> dict[str, float]:
        """Nothing: samples a second say it."""
        return {}

    def export(self, about: Mapping[str, Any] | None = None) -> Path:
        """Write the best model to ``model/``, with its tokenizer, what its answers mean, and its metrics.

        Args:
            about: what ``results.json`` is to say besides, such as the commit.

        Returns:
            The folder.

        Raises:
            UserError: it cannot be written, or the best checkpoint cannot be read.
        """
        folder = self.directory / "model"
        if self.world.main:
            checkpoints = self.directory / "checkpoints"
            whole = checkpoints / "best.pt"
            best = read_newest(whole if whole.exists() else best_folders(checkpoints)[0])
            model = self.task.model(self.config.model)
            model.load_state_dict(best.state["model"])
            model.save_pretrained(folder)
            self.data.tokenizer.save_pretrained(folder)
            self.task.save(self.data.val_source, folder)
            step = int(best.state["step"])
            rows = read_metrics(self.directory / "metrics.jsonl")
            values = next(row for row in reversed(rows) if row["kind"] == "val" and row["step"] == step)
            write_json(folder / TASK_FILE, {"task": self.task.name, "config": self.config.to_dict()})
            found = {name: value for name, value in values.items() if name not in ("kind", "step")}
            source, tables = self.data.val_source, self.config.data.val_tables
            told = describe(self.task, self.config, source, tables, self.config.task.recipe)
            write_results(self.directory / "results.json", {**told, "step": step, **(about or {})}, found)
        self.world.barrier()
        return folder


def resolve(task: Task, config: FinetuneConfig, train: TaskSource, world_size: int) -> FinetuneConfig:
    """Set the numbers of a configuration that follow from the data and the processes.

    Args:
        task: that is trained.
        config: of ``load_finetune``.
        train: samples to train on.
        world_size: number of processes.

    Returns:
        The configuration, with the sizes of the head, and ``run.accumulation``, ``max_steps`` and ``val_every``.

    Raises:
        UserError: a checkpoint that is fine-tuned already for other answers, or a global batch that cannot be shared.
    """
    if config.weights.pretrained is not None:
        folder = Path(config.weights.pretrained)
        if (folder / "config.json").is_file():
            stored = stored_config(folder / "config.json")
            if set(task.heads) <= set(stored.heads):
                task.check_model(train, folder, stored)
    model = config.model.replace(**task.sizes(train))
    run, own = config.run, config.task
    rows = run.batch_size * world_size
    if own.global_batch is not None:
        accumulation, rest = divmod(own.global_batch, rows)
        if rest or not accumulation:
            raise UserError(
                f"task.global_batch: got {own.global_batch}, expected a multiple of {rows} ({world_size} processes x "
                f"run.batch_size {run.batch_size}); set run.batch_size to a divisor of it, or task.global_batch=null"
            )
        run = replace(run, accumulation=accumulation)
    epoch = max(1, train.num_samples // (rows * run.accumulation))
    if own.epochs is not None:
        run = replace(run, max_steps=max(1, round(own.epochs * epoch)))
    if own.val_epochs is not None:
        run = replace(run, val_every=max(1, round(own.val_epochs * epoch)))
    return replace(config, model=model, run=run)


def _identity_of(source: TaskSource) -> dict[str, Any]:
    return {"pairs": int(source.num_samples), "images": int(source.num_images), "digest": source.digest}
