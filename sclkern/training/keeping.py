"""What a run keeps of its training: checkpoints while it trains, and every step that was taken however that ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sclkern.errors import Interrupted, UserError, WorkerError
from sclkern.training.config import PretrainConfig
from sclkern.training.failures import left_alone
from sclkern.training.health import FiniteCheck
from sclkern.training.parallel import Parallel
from sclkern.training.saving import CheckpointWriter
from sclkern.training.signals import StopSignals
from sclkern.training.state import TrainingState

log = logging.getLogger("sclkern.training")


class Keeper:
    """Saves the state of a run; of many processes all make the same calls.

    Args:
        config: of the run.
        state: what a checkpoint holds.
        data_identity: of the data, which a resumed run compares.
        parallel: how the processes share the model.
        finite: what was observed of the steps; weights that are not finite are not saved.
        stop: the signals that stop the run.

    Attributes:
        writer: writes the checkpoints.
    """

    writer: CheckpointWriter

    def __init__(
        self,
        config: PretrainConfig,
        state: TrainingState,
        data_identity: dict[str, Any],
        parallel: Parallel,
        finite: FiniteCheck,
        stop: StopSignals,
    ) -> None:
        self.config, self.state, self.data_identity = config, state, data_identity
        self.parallel, self.finite, self.stop = parallel, finite, stop
        self.writer = CheckpointWriter(
            Path(config.run.output_dir) / "checkpoints",
            keep=config.run.keep,
            latest_step=state.saved_step,
            group=parallel.writers,
        )
        self._writes = parallel.world.main or parallel.writers is not None
        self._updating = False

    def save(self, name: str) -> None:
        """Copy the run, and let the checkpoint be written while training goes on.

        Args:
            name: "latest" or "best".

        Raises:
            UserError: weights that are not finite, or the checkpoint before could not be written.
        """
        state, run = self.state, self.config.run
        self.finite.require(state.step, state.saved_step)
        point = state.step, state.validated

        def whole() -> None:
            if name == "latest":
                state.saved = point

        with self.stop.stage(f"{name}.pt of step {state.step} is written, then the run stops", patience=None):
            content = {
                "config": self.config.to_dict(),
                "data": self.data_identity,
                "global_batch": self.parallel.world.size * run.batch_size * run.accumulation,
                **state.state_dict(),
            }
            if self._writes:
                self.writer.save(name, content, whole)
            else:
                whole()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around the update of the weights: after an error within, they are updated by half and never saved."""
        self._updating = True
        yield
        self._updating = False

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Around the training of a run: what was trained is saved however that ends.

        Raises:
            UserError: as training, or a checkpoint cannot be written.
            WorkerError: a data worker died.
        """
        try:
            with suppress(Interrupted):
                yield
            self.writer.wait()
            if self.state.unsaved:
                self.save("latest")
            self.writer.wait()
        except UserError:
            self._save_if_possible()
            raise
        except Exception as error:
            self._save_if_possible()
            # A scheduler may have ended a process that worked for this one, such as a compiler, by the same signal;
            # but torchrun sends one when another process of the run has died.
            if not self.stop.requested or left_alone(error):
                if isinstance(error, WorkerError):
                    remedy = "go on with --resume, with fewer data.num_workers or more memory"
                    raise WorkerError(f"{error}; {self._kept()}; {remedy}") from error
                raise
            log.warning("after the signal: %s: %s", type(error).__name__, str(error).partition("\n")[0])

    def _kept(self) -> str:
        saved = self.state.saved_step
        return f"the checkpoint of step {saved} is kept" if saved >= 0 else "no step was saved"

    def _save_if_possible(self) -> None:
        """Save after a failure, which is what will be reported; never weights that are updated by half."""
        if not self._writes or self.parallel.writers is not None:
            return  # rank 0 has the whole; or all would have to write, and one has failed
        with suppress(UserError):
            self.writer.wait()
        # The latest checkpoint is of before the validation whose best model was not written: it will be repeated.
        if self.state.unsaved and not self._updating and self.writer.failed != "best":
            with suppress(UserError, RuntimeError):
                self.save("latest")
                self.writer.wait()
