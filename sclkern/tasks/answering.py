"""A model's answers to every sample of a source, shared out among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from sclkern.data.frames import FrameSampling
from sclkern.data.source import PairSource
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import ImageTransform, build_transform
from sclkern.data.undecodable import UndecodableImages
from sclkern.distributed import gather_parts, merge
from sclkern.evaluation.reranking import Reranking
from sclkern.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from sclkern.tasks.batches import TaskBatches, TaskLoader
from sclkern.tasks.config import FinetuneConfig
from sclkern.tasks.model import TaskModel
from sclkern.tasks.task import Task, TaskSource
from sclkern.training.passes import copied
from sclkern.training.world import World


class Answering:
    """Answers samples with the settings of a configuration: its transform, batch and precision.

    Processes deal out whole batches, so that each batch, and every answer, is the same for any number of them.

    Args:
        task: of the samples.
        config: of the run.
        tokenizer: of the model.
        world: the processes, all of which make the same calls.
        device: of the model.
        between: called before each batch; may raise.
    """

    def __init__(
        self,
        task: Task,
        config: FinetuneConfig,
        tokenizer: CaptionTokenizer,
        world: World,
        device: torch.device,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        self.task, self.config, self.tokenizer = task, config, tokenizer
        self.world, self.device, self.between = world, device, between

    def transform(self, name: str) -> ImageTransform:
        """A transform of pictures, for the model."""
        data, size = self.config.data, self.config.model.image_size
        return build_transform(name, size, normalize=data.normalize == "host", decoding=data.decoding)

    def batches(self, source: TaskSource, *, training: bool = False) -> TaskBatches:
        """What makes the batches of a source.

        Args:
            source: of the samples.
            training: whether pictures are augmented, and the frames of clips drawn, as in training.

        Returns:
            The batches.
        """
        config, data = self.config, self.config.data
        return TaskBatches(
            self.task,
            source,
            self.tokenizer,
            self.transform(data.transform if training else data.val_transform),
            max_text_len=config.model.max_text_len,
            min_size=config.model.patch_size,
            seed=config.run.seed,
            choose_frames=FrameSampling(data.num_frames, data.frame_sampling if training else data.val_frame_sampling),
        )

    @torch.no_grad()
    def predict(self, model: TaskModel, source: TaskSource) -> Tensor:
        """Answer every sample.

        Args:
            model: put into eval mode meanwhile; it computes without collectives.
            source: of the samples.

        Returns:
            (samples, ...) on the CPU, in the order of the source, the same on every rank.

        Raises:
            UserError: too many pictures cannot be decoded.
            WorkerError: a data worker died.
        """
        was_training = model.training
        model.eval()
        loader = TaskLoader(
            self.batches(source),
            batch_size=self.config.task.evaluation_batch,
            seed=self.config.run.seed,
            num_workers=self.config.data.num_workers,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        bfloat16 = self.config.run.precision == "bfloat16"
        own: dict[int, Tensor] = {}
        undecodable: dict[str, str] = {}
        with closing(loader.in_order()) as batches:
            for number in loader.numbers():
                self.between()
                batch: dict[str, Any] = next(batches)
                undecodable |= batch.pop("undecodable")
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                    own[number] = model.predict(copied(batch, self.device, None)).cpu()
        UndecodableImages(source.num_images).add(merge(undecodable) if self.world.size > 1 else undecodable)
        model.train(was_training)
        return gather_parts(own) if self.world.size > 1 else torch.cat([own[number] for number in sorted(own)])

    def retrieve(self, model: TaskModel, pairs: PairSource) -> RetrievalResult:
        """Recalls over the pictures and captions of a source.

        Args:
            model: with the heads ``itc`` and ``rank``.
            pairs: the pictures and captions.

        Returns:
            The recalls; the ranking head orders the first ``task.rerank`` candidates of the contrast, or all.
        """
        return evaluate_retrieval(
            model,
            pairs,
            self.tokenizer,
            self.transform(self.config.data.val_transform),
            batch_size=self.config.task.evaluation_batch,
            rerank=Reranking(candidates=self.config.task.rerank, score="rank"),
            ks=(50,),
            choose_frames=FrameSampling(self.config.data.num_frames, self.config.data.val_frame_sampling),
            precision=torch.bfloat16 if self.config.run.precision == "bfloat16" else None,
            between_batches=self.between,
            distributed=self.world.size > 1,
        )
