"""What a task is, and the table of all tasks. Each task is one file that registers itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sclkern.data.source import PairSource
from sclkern.data.undecodable import Pictures
from sclkern.errors import UserError
from sclkern.evaluation.retrieval import RetrievalResult
from sclkern.models.config import SCLConfig
from sclkern.tasks.model import TaskModel


class TaskSource(Pictures, Protocol):
    """Samples of a task, read in any order, the same after pickling and for the same files.

    With a method ``image_bytes``, as in ``PairSource``, a large JPEG is decoded at a part of its size.

    Attributes:
        num_samples: number of samples.
        num_images: number of pictures.
        digest: changes with the samples and what is asked of them.
    """

    num_samples: int
    num_images: int
    digest: str

    def image_name(self, image: int) -> str:
        """Where a picture comes from, for messages. Names are unique."""


class Sample(NamedTuple):
    """What a batch takes of a sample.

    Attributes:
        images: numbers of its pictures, as many in every sample of a task.
        texts: likewise.
        target: what ``Task.collate`` gets.
    """

    images: tuple[int, ...]
    texts: tuple[str, ...]
    target: Any


class Outcome(NamedTuple):
    """What an evaluation has found.

    Attributes:
        values: metrics by name; none where the data have no answers.
        submission: the file that a server of the task takes, as plain values; None where it has none.
        about: what was evaluated, as plain values; that of a task itself is empty.
    """

    values: dict[str, float]
    submission: Any = None
    about: Mapping[str, Any] = MappingProxyType({})


class Evaluator(Protocol):
    """Runs a model over a source; of many processes all make the same calls and get the same."""

    def predict(self, model: TaskModel, source: TaskSource) -> Tensor:
        """Answers to every sample of a source, in its order: (samples, ...) on the CPU."""

    def retrieve(self, model: TaskModel, pairs: PairSource) -> RetrievalResult:
        """Recalls over the pictures and captions of a source."""


Recipes = Mapping[str, Mapping[str, Mapping[str, Any]]]


class Task(ABC):
    """A downstream task: its recipe, head, collation and metric.

    Attributes:
        name: on the command line.
        title: for people.
        model: its network, whose ``loss`` is trained.
        heads: of ``sclkern.models.config.HEADS``, those that it has.
        splits: names of the tables of each split, of which "val" is what a run selects by.
        recipes: "default" and "published": values of the configuration, section -> key -> value.
        metric: of ``measure``, by which the best model is chosen; larger is better.
        zero_shot: heads of pre-training by which a model answers that is not fine-tuned; () where it cannot.
    """

    name: str
    title: str
    model: type[TaskModel]
    heads: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    recipes: Recipes
    metric: str
    zero_shot: tuple[str, ...] = ()

    @abstractmethod
    def open(self, root: str | Path, tables: Sequence[str]) -> TaskSource:
        """Open tables.

        Args:
            root: folder of the data.
            tables: their names.

        Returns:
            Their samples.

        Raises:
            UserError: they cannot be read, or are of another task.
        """

    @abstractmethod
    def sample(self, source: Any, number: int) -> Sample:
        """A sample of a source; draws come from torch's default generator, seeded for each sample."""

    @abstractmethod
    def collate(self, source: Any, targets: list[Any]) -> dict[str, Tensor]:
        """What a batch has beside pictures and texts, from the targets of its samples."""

    @abstractmethod
    def measure(self, source: Any, predictions: Tensor) -> Outcome:
        """The metrics of the predictions for every sample of a source."""

    def evaluate(
        self, source: Any, model: TaskModel, evaluator: Evaluator, *, annotations: Path | None = None
    ) -> Outcome:
        """Answer every sample, and measure the answers.

        Args:
            source: of ``open``.
            model: that answers.
            evaluator: runs it.
            annotations: file of the answers as it is distributed, for a score that the tables do not give.

        Returns:
            The metrics.

        Raises:
            UserError: the task knows no such file.
        """
        self.refuse(annotations)
        return self.measure(source, evaluator.predict(model, source))

    def refuse(self, annotations: Path | None) -> None:
        """Raise a ``UserError`` if there are annotations, of a task that is scored by its tables."""
        if annotations is not None:
            raise UserError(f"--annotations: got {annotations}, but {self.name} is scored by its tables; leave it out")

    def answered(self, source: Any) -> bool:
        """Whether a source has the answers that ``measure`` needs."""
        return True

    def check_training(self, source: Any) -> None:  # noqa: B027
        """Raise a ``UserError`` unless a source has what training draws from it."""

    def sizes(self, source: Any) -> dict[str, int]:
        """Fields of ``SCLConfig`` that follow from the data."""
        return {}

    def check_model(self, source: Any, folder: Path, config: SCLConfig) -> None:  # noqa: B027
        """Raise a ``UserError`` unless a fine-tuned model in a folder answers what the data ask."""

    def save(self, source: Any, folder: Path) -> None:  # noqa: B027
        """Write what the model's answers mean beside it."""


TASKS: dict[str, Task] = {}


def register_task(task: type[Task]) -> type[Task]:
    """Add a task to the table, after which the command line may name it.

    Args:
        task: its class, which is made without arguments.

    Returns:
        The class.

    Raises:
        ValueError: another task has this name.
    """
    if task.name in TASKS:
        raise ValueError(f"name: got {task.name!r}, which another task has; choose another name")
    TASKS[task.name] = task()
    return task
