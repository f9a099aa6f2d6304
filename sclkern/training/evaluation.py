"""What a run measures of its model: held-out losses, retrieval, the attention that its report shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from sclkern.data.frames import FrameSampling
from sclkern.data.loader import PairLoader
from sclkern.data.undecodable import UndecodableImages
from sclkern.distributed import merge
from sclkern.evaluation.attention_maps import choose_pairs, plot_attention
from sclkern.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from sclkern.random import mix_seed
from sclkern.training.config import PretrainConfig
from sclkern.training.data import TrainingData
from sclkern.training.negatives import describe_negatives
from sclkern.training.passes import Passes
from sclkern.training.signals import StopSignals
from sclkern.training.validation import Measured

# Stream of the run's seed; the loop has 0 and 1.
_VALIDATION = 2


class RunEvaluation:
    """Measures the model of a run with the settings of its configuration. Whoever calls puts the model into eval mode.

    Of many processes all call the methods at the same point, except ``plot_attention``, with the same weights, and a
    model that computes without collectives.

    Args:
        config: of the run.
        data: of the run.
        passes: the forward pass, with the model.
        undecodable_train: counts the training images that cannot be decoded.
        stop: the signals that stop it between batches.

    Attributes:
        ranks: whether the recipe trains the head that retrieval ranks by.
        rerank: candidates that the matching head re-ranks; 0 if the recipe does not train it.
        undecodable: counts of the images that cannot be decoded, by the name of their set.
    """

    ranks: bool
    rerank: int
    undecodable: dict[str, UndecodableImages]

    def __init__(
        self,
        config: PretrainConfig,
        data: TrainingData,
        passes: Passes,
        undecodable_train: UndecodableImages,
        stop: StopSignals,
    ) -> None:
        self.config = config
        self.data = data
        self.passes = passes
        self.stop = stop
        self._distributed = data.val_loader.world_size > 1
        held_out = sum(source.num_images for source in data.val_sources.values())
        self.undecodable = {"training": undecodable_train, "held-out": UndecodableImages(held_out)}
        trained = {head for objective in config.objectives.selected for head in objective.heads}
        self.ranks = "itc" in trained
        self.rerank = config.evaluation.rerank if "itm" in trained else 0

    def measure(self) -> Measured:
        """Held-out losses, and retrieval where the recipe can retrieve."""
        # Recipes without the ITC head cannot; the lowest total loss is their best.
        values = self.held_out_losses()
        score, line = -values["total"], f"held-out loss {values['total']:.2f}"
        if self.ranks:
            result = self.retrieval()
            values |= {**result.recalls, "recall_sum": result.sum}
            score, line = result.sum, f"{line}, {result.line()}"
        return Measured(values, score, line)

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Mean losses over the held-out pairs that fill whole batches, with the same masks every time.

        Ranks deal out the batches, and all of them return the same.

        Returns:
            Losses and metrics by name. Where images and clips are held out, those of each have names such as
            ``images_itc``, and those without are the means of both.

        Raises:
            UserError: undecodable images above 1 %.
        """
        values = {kind: self._losses_of(loader) for kind, loader in self.data.val_loaders.items()}
        if len(values) == 1:
            return next(iter(values.values()))
        named = {f"{kind}_{name}": value for kind, losses in values.items() for name, value in losses.items()}
        first = next(iter(values.values()))
        return {name: sum(losses[name] for losses in values.values()) / len(values) for name in first} | named

    def _losses_of(self, loader: PairLoader) -> dict[str, float]:
        undecodable = self.undecodable["held-out"]
        losses: dict[int, dict[str, float]] = {}
        left_out: dict[str, str] = {}
        with closing(loader.epoch()) as batches, self._by_itself():
            for number in loader.batches_of_epoch():
                with self.stop.interruptible():
                    batch = next(batches)
                left_out |= batch.pop("undecodable")
                of_batch = self.passes.forward(batch, mix_seed(self.config.run.seed, _VALIDATION, number))
                losses[number] = {name: x.item() for name, x in {**of_batch.named(), **of_batch.metrics}.items()}
        if self._distributed:
            losses, left_out = merge(losses), merge(left_out)
        undecodable.add(left_out)
        # In the order of the batches, whoever computed them, because sums of floats depend on it.
        return {name: sum(losses[number][name] for number in sorted(losses)) / len(losses) for name in losses[0]}

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Losses of this process alone: ranks may have different numbers of batches."""
        model = self.passes.model
        objectives = model.objectives
        if self._distributed:
            model.objectives = replace(objectives, gather=None)
        try:
            yield
        finally:
            model.objectives = objectives

    def retrieval(self, name: str = "held-out", *, max_images: int | None = None) -> RetrievalResult:
        """Zero-shot retrieval from the images of a set, or from its clips.

        Args:
            name: "held-out" or "training", whose images are taken where there are both; or "held-out clips".
            max_images: images to retrieve from, spread evenly over the set; None takes ``evaluation.images``.

        Returns:
            The recalls.
        """
        data = self.config.data
        source = self.data.val_source if name == "held-out" else self.data.train_source
        if name == "held-out clips":
            source = self.data.val_sources["clips"]
        return evaluate_retrieval(
            self.passes.model,
            source,
            self.data.tokenizer,
            self.data.val_transform,
            batch_size=self.config.evaluation.batch_size,
            rerank=self.rerank,
            max_images=max_images or self.config.evaluation.images,
            undecodable=self.undecodable["training" if name == "training" else "held-out"],
            choose_frames=FrameSampling(data.num_frames, data.val_frame_sampling),
            between_batches=self.stop.check,
            distributed=self._distributed,
        )

    def retrievals(self) -> dict[str, RetrievalResult]:
        """Retrieval from each set that the report shows, by its name; none for recipes that cannot retrieve."""
        if not self.ranks:
            return {}
        results = {"held-out": self.retrieval()}
        if len(self.data.val_sources) > 1:
            results["held-out clips"] = self.retrieval("held-out clips")
        if count := self.config.evaluation.train_images:
            results["training"] = self.retrieval("training", max_images=count)
        return results

    def plot_attention(self, path: Path) -> Path | None:
        """Draw the attention of held-out captions over their images.

        Args:
            path: PNG file to write.

        Returns:
            ``path``; None if the configuration wants no plot, or there is no fusion layer or no picture to draw.
        """
        count, model = self.config.evaluation.attention_images, self.config.model
        source = self.data.val_source
        drawn = count and model.fusion_layers and "images" in self.data.val_sources
        pairs = choose_pairs(source, count, model.patch_size) if drawn else []
        if not pairs:
            return None
        plot_attention(path, self.passes.model, source, pairs, self.data.tokenizer, self.data.val_transform)
        return path

    def describe(self) -> str:
        """The run in one line: size, data, batch, negatives, steps."""
        run, config, data = self.config.run, self.config, self.data
        loader = data.train_loader
        parameters = sum(p.numel() for p in self.passes.model.parameters())
        factors = f"{loader.world_size} processes x {run.batch_size} x {run.accumulation} = {loader.global_batch}"
        batch = f"{run.batch_size} x {run.accumulation}" if loader.world_size == 1 else factors
        train, held_out = data.train_sources, data.val_sources
        negatives = describe_negatives(config, loader.world_size, min(source.num_images for source in train.values()))
        sets = " and ".join(
            f"{source.num_images} {kind} with {source.num_pairs} captions" for kind, source in train.items()
        )
        left = " and ".join(
            f"{source.num_images}{' ' + kind if len(held_out) > 1 else ''}" for kind, source in held_out.items()
        )
        alternation = ""
        if len(train) > 1:
            alternation = "".join(f"{100 * share:.3g} % of the steps {kind}, " for kind, share in data.shares.items())
        return (
            f"{parameters / 1e6:.1f} M parameters, recipe {config.objectives.recipe_name}, "
            f"{sets} to train on, {alternation}{left} held out; "
            f"batch {batch}{negatives and f'; negatives: {negatives}'}; "
            f"{run.max_steps} steps = {run.max_steps / loader.steps_per_epoch:.1f} epochs on "
            f"{self.passes.device}, {run.precision}"
        )
