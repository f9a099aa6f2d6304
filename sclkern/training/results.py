"""What a run leaves when it has trained: the model, and the report."""

from __future__ import annotations

from pathlib import Path

from sclkern.errors import UserError
from sclkern.evaluation.retrieval import RetrievalResult
from sclkern.model import SCLModel
from sclkern.training.data import TrainingData
from sclkern.training.evaluation import RunEvaluation
from sclkern.training.logs import read_metrics
from sclkern.training.parallel import Parallel
from sclkern.training.passes import Passes
from sclkern.training.report import RunSummary, write_report


class Results:
    """Writes the results of a run into its folder; of many processes all make the same calls.

    Args:
        directory: of the run.
        data: of the run.
        parallel: how the processes share the model.
        passes: the forward pass, with the model.
        evaluation: of the run.
    """

    def __init__(
        self, directory: Path, data: TrainingData, parallel: Parallel, passes: Passes, evaluation: RunEvaluation
    ) -> None:
        self.directory = directory
        self.data, self.parallel, self.passes, self.evaluation = data, parallel, passes, evaluation

    def export(self) -> Path:
        """Write the model and its tokenizer to ``model/`` for ``SCLModel.from_pretrained``.

        Returns:
            The folder.

        Raises:
            UserError: it cannot be written.
        """
        path = self.directory / "model"
        with self.parallel.whole_model() as model:
            if self.parallel.world.main:
                self._export(model, path)
        self.parallel.world.barrier()
        return path

    def _export(self, model: SCLModel, path: Path) -> None:
        model.save_pretrained(path)
        try:
            self.data.tokenizer.save_pretrained(path)
        except Exception as error:  # the tokenizers library raises a bare Exception for a full disk
            raise UserError(f"{path}: the tokenizer cannot be written ({error}); free space, then --resume") from error

    def report(self) -> Path:
        """Write ``report.md``, ``losses.png`` and ``attention.png``.

        Returns:
            The path of the report.

        Raises:
            UserError: undecodable images above 1 %, or a file cannot be written.
        """
        self.parallel.model.eval()
        with self.passes.whole_model():
            retrieval = self.evaluation.retrievals()
            if self.parallel.world.main:
                self._report(retrieval)
        self.parallel.world.barrier()
        return self.directory / "report.md"

    def _report(self, retrieval: dict[str, RetrievalResult]) -> None:
        summary = RunSummary(
            description=self.evaluation.describe(),
            rows=read_metrics(self.directory / "metrics.jsonl"),
            retrieval=retrieval,
            rerank=self.evaluation.rerank,
            attention=self.evaluation.plot_attention(self.directory / "attention.png"),
            undecodable={name: len(images) for name, images in self.evaluation.undecodable.items()},
        )
        write_report(summary, self.directory)
