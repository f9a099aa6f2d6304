"""Validation of a run: held-out losses and retrieval, and the best model kept."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from sclkern.training.config import PretrainConfig
from sclkern.training.keeping import Keeper
from sclkern.training.logs import RunLog, SilentLog
from sclkern.training.passes import Passes
from sclkern.training.signals import StopSignals
from sclkern.training.state import TrainingState


class Measured(NamedTuple):
    """What a validation has found.

    Attributes:
        values: for the log, by name.
        score: by which the best model is chosen; larger is better.
        line: of them, for people.
    """

    values: dict[str, float]
    score: float
    line: str


class Evaluation(Protocol):
    """Measures the model of a run, which is in eval mode and has all of its weights in this process."""

    def measure(self) -> Measured:
        """The values; of many processes all return the same."""


class Validation:
    """Validates the model of a run; of many processes all make the same calls.

    Args:
        config: of the run.
        state: its counters, which say what was validated, and the best score.
        passes: the forward pass, with the model.
        evaluation: of the run.
        keeper: saves the steps before a validation, and the best model after it.
        stop: the signals that stop the run.
    """

    def __init__(
        self,
        config: PretrainConfig,
        state: TrainingState,
        passes: Passes,
        evaluation: Evaluation,
        keeper: Keeper,
        stop: StopSignals,
    ) -> None:
        self.config, self.state, self.passes = config, state, passes
        self.evaluation, self.keeper, self.stop = evaluation, keeper, stop

    @property
    def due(self) -> bool:
        """Whether the step that was taken last still needs its validation."""
        step, run = self.state.step, self.config.run
        every = run.val_every > 0 and step % run.val_every == 0
        return step > self.state.validated and step > 0 and (step == run.max_steps or every)

    def run(self, run_log: RunLog | SilentLog) -> None:
        """Validate when the steps are saved, because it takes long, and the memory of retrieval.

        Args:
            run_log: receives the values.

        Raises:
            UserError: undecodable images above 1 %, or a checkpoint cannot be written.
        """
        if self.state.unsaved:
            self.keeper.save("latest")
        step = self.state.step
        awaited = f"step {step} is saved; the run stops after its validation; a second signal stops without waiting"
        with self.stop.stage(awaited, patience=1):
            self._validate(run_log)

    def _validate(self, run_log: RunLog | SilentLog) -> None:
        self.passes.model.eval()
        with self.passes.whole_model():
            found = self.evaluation.measure()
        run_log.write("val", self.state.step, found.values)
        run_log.message(f"step {self.state.step}: {found.line}")
        self.state.validated = self.state.step
        if found.score > self.state.best:
            self.state.best = found.score
            self.keeper.save("best")
