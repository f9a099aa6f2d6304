"""Pre-training by the recipe of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sclkern.data.mixture import kind_of_batch
from sclkern.model import SCLModel
from sclkern.step import check_objectives
from sclkern.training.data import TrainingData, open_data
from sclkern.training.evaluation import RunEvaluation
from sclkern.training.loop import Training
from sclkern.training.negatives import count_negatives
from sclkern.training.results import Results
from sclkern.training.setup import initial_model
from sclkern.training.throughput import Throughput
from sclkern.training.validation import Validation


class Pretraining(Training):
    """Pre-training by the recipe of a configuration; the arguments are those of ``Training``.

    Attributes:
        data: of the run.
    """

    data: TrainingData

    def check(self) -> None:
        """Raise a ``UserError`` unless the model has the heads of the recipe."""
        check_objectives(self.config.model, self.config.objectives)

    def open_data(self) -> TrainingData:
        """The data that ``config.data`` names."""
        return open_data(self.config, self.device, rank=self.world.rank, world_size=self.world.size)

    def build_model(self, *, initial: bool) -> SCLModel:
        """The model of ``config.model``."""
        config = self.config
        return initial_model(config) if initial else SCLModel(config.model, config.objectives)

    def prepare(self) -> None:
        """Set what measures and reports the model."""
        config, data = self.config, self.data
        self.evaluation = RunEvaluation(config, data, self.passes, self.state.undecodable, self.stop)
        self.results = Results(self.directory, data, self.parallel, self.passes, self.evaluation)
        self.validation = Validation(config, self.state, self.passes, self.evaluation, self.keeper, self.stop)
        pad_to_max, shares = data.train_loader.pad_to_max, data.frame_shares(config)
        self.throughput = Throughput(config, data.caption_lengths, pad_to_max, self.device, shares)

    def describe(self) -> str:
        """The run in one line."""
        return self.evaluation.describe()

    def image_name(self, batch: Mapping[str, Any], pair: int) -> str:
        """The name of the image of a training pair of a batch."""
        source = self.data.train_sources[kind_of_batch(batch)]
        return source.image_name(source.pair_image[pair])

    @property
    def loss_names(self) -> tuple[str, ...]:
        """``total`` and the objectives of the recipe."""
        return ("total", *(objective.name for objective in self.config.objectives.selected))

    def rates(self, pairs_per_second: float) -> dict[str, float]:
        """Arithmetic a second, and the negatives of each contrast."""
        size = self.world.size
        negatives = {f"{name}_negatives": number for name, number in count_negatives(self.config, size).items()}
        return {**self.throughput.at(pairs_per_second, size), **negatives}
