"""The training loop, whatever it trains.

Everything random is a function of (seed, step): masks, dropout, the order and augmentation of the data. A checkpoint
therefore needs no generator state, and a resumed run computes what an uninterrupted one would, bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sclkern.data.undecodable import UndecodableImages
from sclkern.errors import Interrupted, UserError
from sclkern.model import SCLModel
from sclkern.profiling import phase
from sclkern.random import mix_seed, step_seed
from sclkern.step import SCLLosses, check_capture
from sclkern.training.checkpoint import remedy
from sclkern.training.choices import check_choices, describe_choices
from sclkern.training.clock import StepClock
from sclkern.training.config import PretrainConfig
from sclkern.training.data import data_difference
from sclkern.training.deadline import deadline_of
from sclkern.training.directory import SavedRun, begin, check_shared, lock_directory, open_directory
from sclkern.training.forecast import Forecast
from sclkern.training.health import FiniteCheck
from sclkern.training.keeping import Keeper
from sclkern.training.logs import RunLog, SilentLog
from sclkern.training.observing import Processes, learning_rates
from sclkern.training.optim import build_optimizer, schedule_factor, set_learning_rate
from sclkern.training.parallel import check_parallel, share_model
from sclkern.training.passes import Passes
from sclkern.training.setup import resolve_device
from sclkern.training.signals import StopSignals
from sclkern.training.state import TrainingState
from sclkern.training.throughput import precision_remark
from sclkern.training.tracking import check_tracker, open_tracker
from sclkern.training.validation import Validation
from sclkern.training.watchdog import Watchdog
from sclkern.training.world import Agreement, World

log = logging.getLogger("sclkern.training")

# Stream of the run's seed; steps have 1, validation has 2.
_MODEL = 0


class _Loader(Protocol):
    def steps(self, start: int = 0) -> Generator[dict[str, Any]]: ...


class RunData(Protocol):
    """What the loop reads of the data of a run, whatever it trains."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again, as ``data_difference`` compares it."""

    @property
    def num_train_images(self) -> int:
        """Of which some may be undecodable."""

    @property
    def train_loader(self) -> _Loader:
        """Gives this process's micro-batches from a step on: dicts with ``undecodable``, reasons by name."""


class Training(ABC):
    """One run: its model, data and optimiser, and the folder it writes. Subclasses say what is trained.

    Args:
        config: the resolved configuration.
        resume: whether to continue from ``checkpoints/latest.pt`` of the output folder, if there is one.
        stop: the signals that stop it; None takes them during ``run``.
        world: the processes that train together, each of which makes the same calls; None is this one by itself.

    Attributes:
        data: of the run.
        validation: of the run.

    Raises:
        UserError: the configuration, the data or the folder cannot work.
    """

    data: RunData
    validation: Validation

    def __init__(
        self,
        config: PretrainConfig,
        *,
        resume: bool = False,
        stop: StopSignals | None = None,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.world = World() if world is None else world
        self.stop = StopSignals() if stop is None else stop
        self.stop.alone = self.world.size == 1
        self.agreement = Agreement(self.world)
        self._agreed_to_stop = False
        # Of this step; the other processes do not know them yet.
        self._undecodable: dict[str, str] = {}
        self.directory = Path(config.run.output_dir)
        self.device = resolve_device(config.run.device, self.world)
        if config.run.cuda_graphs:
            check_capture(self.device, config.step)
        check_choices(config, self.device)
        check_tracker(config.run.tracker)
        self.check()
        check_parallel(config, self.world)
        self.deadline = deadline_of(config.run.stop_before)
        # Before anything is read: the run that still holds the folder may save another step.
        self._lock = lock_directory(self.directory) if self.world.main else None
        saved = self._open_directory(resume)
        if self.world.size > 1 and config.run.parallel == "fsdp":
            check_shared(self.directory, self.world)
        self.data = self.open_data()
        if saved and "data" in saved.state:
            difference = data_difference(saved.state["data"], self.data.identity)
            if difference:
                raise UserError(
                    f"{saved.path}: {difference}; resume over the data of the run, or start in another folder"
                )
        torch.manual_seed(mix_seed(config.run.seed, _MODEL))
        # A resumed run needs no other weights, nor the file they once came from.
        model = self.build_model(initial=saved is None)
        model.step = config.step
        model.set_backend(config.run.backend).set_layer_norm(config.run.layer_norm).to(self.device)
        self.parallel = share_model(model, config, self.world)
        self.model = self.parallel.model
        self.optimizer = build_optimizer(self.model, config.optimizer)
        undecodable = UndecodableImages(self.data.num_train_images)
        self.state = TrainingState(self.model, self.optimizer, undecodable)
        if saved:
            try:
                self.state.load_state_dict(saved.state, saved.path if saved.in_parts else None)
            except UserError as error:
                raise UserError(f"{saved.path}: {error}; {remedy(saved.path)}") from error
        self.parallel.begin()
        self.passes = Passes(self.model, config, self.device, self.parallel)
        self.finite = FiniteCheck(self.model, self.device, self.world)
        self.keeper = Keeper(config, self.state, self.data.identity, self.parallel, self.finite, self.stop)
        self.clock = StepClock()
        self.processes = Processes(self.device, config.data.num_workers)
        self.forecast = Forecast(config.run, self.directory)
        self.prepare()
        if remark := precision_remark(self.device, config.run.precision):
            log.warning(remark)
        if self.world.main:
            begin(config, saved)

    # -- what is trained -----------------------------------------------------------------------------------------------

    @abstractmethod
    def check(self) -> None:
        """Raise a ``UserError`` for a configuration that cannot work, before anything is read."""

    @abstractmethod
    def open_data(self) -> RunData:
        """The data of the run, which fit its configuration."""

    @abstractmethod
    def build_model(self, *, initial: bool) -> SCLModel:
        """The model on the CPU; with ``initial`` it has the weights that a new run starts from."""

    @abstractmethod
    def prepare(self) -> None:
        """Set ``validation``, and what else of the run needs everything else of it."""

    @abstractmethod
    def describe(self) -> str:
        """The run in one line."""

    @abstractmethod
    def image_name(self, batch: Mapping[str, Any], pair: int) -> str:
        """The name of the image of a sample of a training batch, which has it under ``pair``."""

    @property
    @abstractmethod
    def loss_names(self) -> tuple[str, ...]:
        """The losses that the progress bar shows, ``total`` first."""

    @abstractmethod
    def rates(self, pairs_per_second: float) -> dict[str, float]:
        """What a logged step says of its rate, and of what does not change."""

    # -- the run -------------------------------------------------------------------------------------------------------

    def _open_directory(self, resume: bool) -> SavedRun | None:
        """What rank 0 finds in the folder of the run, on every rank."""
        found = None
        if self.world.main:
            found = open_directory(self.config, resume=resume, world_size=self.world.size)
        content = self.world.broadcast(None if found is None else vars(found))
        return None if content is None else SavedRun(**content)

    def _open_log(self) -> RunLog | SilentLog:
        if not self.world.main:
            return SilentLog()
        state, run = self.state, self.config.run
        resumed = state.step > 0
        tracker = open_tracker(run.tracker, self.directory, resumed=resumed, config=self.config.to_dict())
        steps = {"start": state.step, "total": run.max_steps, "validated": state.validated}
        return RunLog(self.directory, **steps, tracker=tracker)

    @property
    def _stopping(self) -> bool:
        """Whether a signal has come; of many processes, whether they have agreed to stop because one has come."""
        return self.stop.requested if self.world.size == 1 else self._agreed_to_stop

    def all_go_on(self) -> bool:
        """Whether no process has received a signal; called by all processes."""
        return not any(self.world.gather(self.stop.requested))

    def run(self) -> bool:
        """Train to the end, or to ``stop_at`` or a signal, after which the latest checkpoint is on disk.

        After any error, the steps that were taken are saved too, if that is possible.

        Returns:
            Whether the run reached ``max_steps`` and its last validation ended.

        Raises:
            UserError: undecodable images above 1 %, a loss that is not finite, a checkpoint that cannot be written.
            WorkerError: a data worker died.
            Interrupted: a signal came before the first step of a new run, so that there is nothing to save.
        """
        run, state = self.config.run, self.state
        last = run.max_steps if run.stop_at is None else min(run.stop_at, run.max_steps)
        if state.step < last or self.validation.due:
            with (
                self.stop,
                self._open_log() as run_log,
                self.passes.meetings,
                closing(self.batches()) as batches,
                self.stop.stage("the run is saved and stops", patience=None),
                self._watched(),
            ):
                run_log.message(self.describe() + (f"; from step {state.step}" if state.step else ""))
                shared = {"parallel": f"{run.parallel} of {self.world.size} processes"} if self.world.size > 1 else {}
                run_log.describe(state.step, describe_choices(self.config) | shared)
                with self.keeper.to_the_end():
                    self._train(batches, run_log, last)
            if self._stopping:
                if state.saved_step < 0:
                    raise Interrupted(self.stop.number or signal.SIGTERM)
                if self.world.main:
                    log.warning("stopped at step %d, saved; go on with --resume", state.saved_step)
        elif state.step < run.max_steps and self.world.main:
            log.warning("nothing to do: step %d is saved, and run.stop_at is %d; raise it, or set it to null to go on",
                        state.step, run.stop_at)  # fmt: skip
        return state.step >= run.max_steps and not self.validation.due

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Training in which a process that hangs ends the run."""
        # Not by ``self``, which would live on in a cycle and hold the lock of its folder.
        world, state = self.world, self.state
        watchdog = Watchdog(
            self.config.run.watchdog_seconds,
            lambda: state.step,
            store=world.store,
            rank=world.rank,
            size=world.size,
        )
        with watchdog:
            self.stop.checked = watchdog.beat
            yield

    def _train(self, batches: Generator[dict[str, Any]], run_log: RunLog | SilentLog, last: int) -> None:
        run, state = self.config.run, self.state
        if self.validation.due:  # the run was stopped within it
            self.validation.run(run_log)
        self.clock.restart()
        while state.step < last and not self._stopping:
            self.keeper.writer.check()
            awaited = f"step {state.step + 1} is taken and saved, then the run stops; a second signal leaves it out"
            with self.stop.stage(awaited, patience=1):
                self.train_step(batches, run_log)
            if self.validation.due and not self._stopping:
                self.validation.run(run_log)
                self.clock.restart()
            if run.save_every and state.step % run.save_every == 0:
                self.keeper.save("latest")

    def batches(self) -> Generator[dict[str, Any]]:
        """Micro-batches of this process from the current step on, epoch after epoch."""
        return self.data.train_loader.steps(self.state.step)

    def train_step(self, batches: Generator[dict[str, Any]], run_log: RunLog | SilentLog) -> None:
        """Take one optimiser step.

        Args:
            batches: gives ``run.accumulation`` micro-batches.
            run_log: receives the losses and rates of every ``run.log_every``-th step.

        Raises:
            UserError: undecodable images above 1 %, or a loss that is not finite.
        """
        run, state = self.config.run, self.state
        # Of many processes one decides, and all stop with it.
        if self.world.main and self.deadline.is_near(self.keeper.writer.write_seconds) and not self.stop.requested:
            log.warning("run.stop_before: step %d is the last that fits", state.step + 1)
            self.stop.request()
        self.model.train()
        set_learning_rate(self.optimizer, schedule_factor(state.step, run.max_steps, self.config.optimizer))
        # Without an argument: apex's takes none, and clears gradients as torch's does.
        self.optimizer.zero_grad()
        values: dict[str, Tensor] = {}
        for losses in self._losses(batches):
            for name, value in {**losses.named(), **losses.metrics}.items():
                share = value.detach() / run.accumulation
                values[name] = values[name] + share if name in values else share
        # Answered while the weights are updated.
        self.agreement.ask(self.stop.requested, bool(self._undecodable))
        self.parallel.finish_gradients()
        with phase("gradient norm"):
            values["grad_norm"] = self.parallel.clip_gradients(self.config.optimizer.max_grad_norm)
        # Of many processes, all find the same at the same step.
        self.finite.observe(values["grad_norm"], *([values["total"]] if self.world.size == 1 else []))
        if self.device.type == "cpu":
            self.finite.require(state.step + 1, state.saved_step, values)
        with self.keeper.updating():
            with phase("optimiser"):
                self.optimizer.step()
            state.step += 1
        self.clock.count_step()
        run_log.advance()
        if needed := self.forecast.count_step(state.step, self.optimizer):
            run_log.message(needed)
        with self.passes.meetings.waiting():
            self._agreed_to_stop, found = self.agreement.answer()
        if found:
            self._count_undecodable()
        if state.step == 1 or state.step % run.log_every == 0:
            self.finite.require(state.step, state.saved_step, values)
            self._log_step({name: value.item() for name, value in values.items()}, run_log)
            self.clock.restart()

    def _losses(self, batches: Generator[dict[str, Any]]) -> Iterator[SCLLosses]:
        """The losses of each micro-batch of a step, whose gradients have been added."""
        run = self.config.run
        seed = step_seed(run.seed, self.state.step)
        if run.contrastive_batch is not None:
            read = [self._searched(self._next(batches)) for _ in range(run.accumulation)]
            yield from self.passes.contrast_all(read, seed)
            return
        for micro in range(run.accumulation):
            batch = self._searched(self._next(batches))
            yield self.passes.forward_backward(batch, seed, last=micro == run.accumulation - 1)

    def _next(self, batches: Generator[dict[str, Any]]) -> dict[str, Any]:
        with self.clock.waiting(), phase("data wait"), self.stop.interruptible():
            batch = next(batches)
        # All know the earlier ones: a bad image returns in every epoch, and as the negative of others.
        found = batch.pop("undecodable")
        self._undecodable |= {name: why for name, why in found.items() if name not in self.state.undecodable}
        return batch

    def _searched(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, of which an image that is not finite is remembered by its name."""
        self.finite.observe_images(self.state.step + 1, batch, partial(self.image_name, batch))
        return batch

    def _count_undecodable(self) -> None:
        for found in self.world.gather(self._undecodable):
            self.state.undecodable.add(found)
        self._undecodable = {}

    def _log_step(self, values: dict[str, float], run_log: RunLog | SilentLog) -> None:
        """Log the means over the processes."""
        run, size = self.config.run, self.world.size
        step_seconds, data_seconds = self.clock.mean_seconds()
        waited = self.passes.meetings.seconds() / self.clock.steps
        ranks = self.world.gather(self.processes.own(step_seconds, data_seconds, waited))
        means = self.world.mean({**values, "step_seconds": step_seconds, "data_seconds": data_seconds})
        values, rate = means, size * run.batch_size * run.accumulation / means["step_seconds"]
        run_log.progress({name: values[name] for name in self.loss_names}, rate)
        values |= {**learning_rates(self.optimizer), "pairs_per_second": rate, **self.rates(rate)}
        values |= self.processes.compare(ranks)
        writer = self.keeper.writer
        if writer.stall_seconds:
            values["save_stall_seconds"], writer.stall_seconds = writer.stall_seconds, 0.0
        run_log.write("train", self.state.step, values)
        if size > 1:
            run_log.write_ranks(self.state.step, ranks)
        # The first step, which compiles and opens files, says nothing of the others.
        for line in self.processes.warnings(ranks, self.clock.steps) if self.state.step > 1 else ():
            run_log.message(line)
