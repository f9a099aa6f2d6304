"""The pre-training loop.

Everything random is a function of (seed, step): masks, dropout, the order and augmentation of the data. A checkpoint
therefore needs no generator state, and a resumed run computes what an uninterrupted one would, bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sclkern.data import PairSource, open_pairs
from sclkern.data.buckets import Buckets
from sclkern.data.dataset import PairDataset
from sclkern.data.loader import PairLoader
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.data.undecodable import UndecodableImages
from sclkern.errors import UserError
from sclkern.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from sclkern.model import SCLModel
from sclkern.profiling import phase
from sclkern.random import mix_seed
from sclkern.step import CapturedStep, SCLLosses, check_capture, check_objectives
from sclkern.training.checkpoint import open_directory, save_checkpoint
from sclkern.training.config import PretrainConfig
from sclkern.training.logs import RunLog
from sclkern.training.optim import build_optimizer, schedule_factor, set_learning_rate
from sclkern.training.setup import check_tokenizer, initial_model, resolve_device
from sclkern.training.throughput import Throughput

log = logging.getLogger("sclkern.training")

# Which stream of the run's seed a draw belongs to.
_MODEL, _STEP, _VALIDATION = range(3)


class Pretraining:
    """One run: its model, data and optimiser, and the folder it writes.

    Args:
        config: the resolved configuration.
        resume: go on from ``checkpoints/latest.pt`` of the output folder if there is one.

    Raises:
        UserError: anything in the configuration, the data or the folder that cannot work.
    """

    def __init__(self, config: PretrainConfig, *, resume: bool = False) -> None:
        self.config = config
        self.directory = Path(config.run.output_dir)
        self.checkpoints = self.directory / "checkpoints"
        self.device = resolve_device(config.run.device)
        if config.run.cuda_graphs:
            check_capture(self.device, config.step)
        check_objectives(config.model, config.objectives)
        saved = open_directory(config, resume=resume)
        self.train_table = open_pairs(
            config.data.root, config.data.train_tables, config.data.train_split, format=config.data.format
        )
        self.val_table = open_pairs(
            config.data.root, config.data.val_tables, config.data.val_split, format=config.data.format
        )
        self.tokenizer = CaptionTokenizer.from_pretrained(config.data.tokenizer)
        check_tokenizer(config, self.tokenizer)
        self.val_transform = build_transform(config.data.val_transform, config.model.image_size)
        self.train_loader = self._loader(self.train_table, config.data.transform, shuffle=True)
        self.val_loader = self._loader(self.val_table, config.data.val_transform, shuffle=False)
        torch.manual_seed(mix_seed(config.run.seed, _MODEL))
        # A resumed run needs no other weights, nor the file they once came from.
        model = SCLModel(config.model, config.objectives) if saved else initial_model(config)
        model.step = config.step
        self.model = model.set_backend(config.run.backend).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.bad_pictures = UndecodableImages(self.train_table.num_images)
        self.bad_val_pictures = UndecodableImages(self.val_table.num_images)
        self.step, self.best = 0, float("-inf")
        if saved:
            rates = [group["base_lr"] for group in self.optimizer.param_groups]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["base_lr"] = rate  # the configuration's, which may have been lowered
            self.bad_pictures.load_state_dict(saved["bad_pictures"])
            self.step, self.best = saved["step"], saved["best"]
        self._saved_step = self.step if saved else -1
        self._stop_requested = False
        self._healthy = torch.ones((), dtype=torch.bool, device=self.device)
        self._precision = torch.bfloat16 if config.run.precision == "bfloat16" else None
        self._captured = None
        if config.run.cuda_graphs:
            self._captured = CapturedStep(self.model, precision=self._precision, scale=1 / config.run.accumulation)
        lengths = self._lengths(self.train_table)
        self._throughput = Throughput(config, lengths, self.train_loader.pad_to_max, self.device)

    # -- set up --------------------------------------------------------------------------------------------------------

    def _loader(self, table: PairSource, transform: str, *, shuffle: bool) -> PairLoader:
        config = self.config
        dataset = PairDataset(
            table,
            self.tokenizer,
            build_transform(transform, config.model.image_size),
            max_text_len=config.model.max_text_len,
            min_size=config.model.patch_size,
            seed=config.run.seed,
            false_image=config.objectives.dataset_negatives,
        )
        batch_size = config.run.batch_size if shuffle else min(config.run.batch_size, table.num_pairs)
        if batch_size < 2 and not config.objectives.dataset_negatives:
            where = f"run.batch_size {batch_size}" if shuffle else f"data.val_tables: {table.num_pairs} pair"
            raise UserError(
                f"{where}, expected 2 or more, because a false image is another row's; or use "
                "objectives.itm_negatives=dataset"
            )
        return PairLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=config.run.seed,
            num_workers=config.data.num_workers,
            # The published masks are drawn over the padded caption.
            pad_to_max=config.objectives.mlm_mask == "reference",
            # A GPU repeats what it has compiled; a CPU computes every token of the room.
            buckets=Buckets.from_lengths(self._lengths(table), batch_size, config.model.max_text_len)
            if self.device.type == "cuda"
            else None,
        )

    def _lengths(self, table: PairSource) -> list[int]:
        """Tokens of a thousand captions of a table."""
        sample = range(0, table.num_pairs, max(1, table.num_pairs // 1000))
        _, mask = self.tokenizer([table.caption(pair) for pair in sample], self.config.model.max_text_len)
        return mask.sum(1).tolist()

    # -- training ------------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the end, or to ``stop_at`` or a SIGTERM or SIGINT, after which the latest checkpoint is on disk.

        Returns:
            Whether the run reached ``max_steps``.

        Raises:
            UserError: undecodable pictures above 1 %, a loss that is not finite, a checkpoint that cannot be written.
        """
        run = self.config.run
        last = run.max_steps if run.stop_at is None else min(run.stop_at, run.max_steps)
        if self.step >= last:
            return self.step >= run.max_steps
        self.log = RunLog(self.directory, start=self.step, total=run.max_steps)
        self.log.message(self.describe() + (f"; from step {self.step}" if self.step else ""))
        try:
            with self._signals():
                batches = self._batches()
                self._restart_clock()
                while self.step < last and not self._stop_requested:
                    self._train_step(batches)
                    if self.step == run.max_steps or _due(self.step, run.val_every):
                        try:
                            self.validate()
                        except UserError:  # of the held-out data: what was trained must not be lost for it
                            self.save("latest")
                            raise
                        self._restart_clock()
                    if _due(self.step, run.save_every):
                        self.save("latest")
                if self.step != self._saved_step:
                    self.save("latest")
        finally:
            self.log.close()
        if self._stop_requested and self.step < last:
            log.warning("stopped at step %d, saved; go on with --resume", self.step)
        return self.step >= run.max_steps

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Micro-batches from the position that belongs to the current step, epoch after epoch."""
        return self.train_loader.endless(*divmod(self.step * self.config.run.accumulation, len(self.train_loader)))

    def _train_step(self, batches: Iterator[dict[str, Any]]) -> None:
        run, optimizer = self.config.run, self.optimizer
        self.model.train()
        set_learning_rate(optimizer, schedule_factor(self.step, run.max_steps, self.config.optimizer))
        optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for micro in range(run.accumulation):
            asked = time.perf_counter()
            with phase("data wait"):
                batch = next(batches)
            self._waited += time.perf_counter() - asked
            self.bad_pictures.add(batch.pop("undecodable"))
            losses = self._micro_step(batch, mix_seed(run.seed, _STEP, self.step, micro))
            for name, value in {**losses.named(), **losses.metrics}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / run.accumulation
        limit = self.config.optimizer.max_grad_norm
        with phase("gradient norm"):
            totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), float("inf") if limit is None else limit
            )
        self._healthy &= torch.isfinite(totals["total"]) & torch.isfinite(totals["grad_norm"])
        if self.device.type == "cpu":
            self._check_healthy(totals)
        with phase("optimiser"):
            optimizer.step()
        self.step += 1
        self.log.advance()
        if self.step == 1 or self.step % run.log_every == 0:
            self._check_healthy(totals)
            values = {name: value.item() for name, value in totals.items()}
            # From one logged step to the next: a GPU still works on the steps between when they return.
            steps = self.step - self._logged_step
            elapsed, waited = (time.perf_counter() - self._logged_time) / steps, self._waited / steps
            rate = run.batch_size * run.accumulation / elapsed
            names = [name for name in losses.named() if name in values]
            self.log.progress({name: values[name] for name in names}, rate)
            values |= {"learning_rate": optimizer.param_groups[0]["lr"], "pairs_per_second": rate}
            values |= {"step_seconds": elapsed, "data_seconds": waited, **self._throughput.at(rate)}
            self.log.write("train", self.step, values)
            self._restart_clock()

    def _restart_clock(self) -> None:
        self._logged_step, self._logged_time, self._waited = self.step, time.perf_counter(), 0.0

    def _micro_step(self, batch: dict[str, Any], seed: int) -> SCLLosses:
        if self._captured is not None:
            return self._captured(batch, seed)
        losses = self._losses(batch, seed)
        with phase("backward"):
            (losses.total / self.config.run.accumulation).backward()
        return losses

    def _losses(self, batch: dict[str, Any], seed: int) -> SCLLosses:
        # Dropout draws from torch's generator: seeded for each micro-batch, it needs no state in the checkpoint.
        torch.manual_seed(seed)
        batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, self._precision, enabled=self._precision is not None):
            return self.model(batch, seed=seed)

    def _check_healthy(self, totals: dict[str, Tensor]) -> None:
        if self._healthy:
            return
        broken = [name for name, value in totals.items() if not torch.isfinite(value)]
        broken += [f"the gradient of {n}" for n, p in self.model.named_parameters() if p.grad is not None
                   and not torch.isfinite(p.grad).all()]  # fmt: skip
        broken += [f"the parameter {n}" for n, p in self.model.named_parameters() if not torch.isfinite(p).all()]
        raise UserError(
            f"step {self.step + 1}: {broken[0] if broken else 'an earlier loss'} is not finite; "
            + (f"the checkpoint of step {self._saved_step} is kept; " if self._saved_step >= 0 else "")
            + "lower optimizer.learning_rate or set optimizer.max_grad_norm, then --resume"
        )

    # -- validation and saving -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> None:
        """Losses on the held-out pairs, as many as fill whole batches, with the same masks every time, and retrieval;
        keeps the best checkpoint."""
        self.model.eval()
        sums: dict[str, float] = {}
        for index, batch in enumerate(self.val_loader.epoch(0)):
            self.bad_val_pictures.add(batch.pop("undecodable"))
            losses = self._losses(batch, mix_seed(self.config.run.seed, _VALIDATION, index))
            for name, value in {**losses.named(), **losses.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        values = {name: value / len(self.val_loader) for name, value in sums.items()}
        result = self.retrieval(self.val_table)
        self.log.write("val", self.step, {**values, **result.recalls, "recall_sum": result.sum})
        self.log.message(
            f"step {self.step}: held-out loss {values['total']:.2f}, recall@1/5/10 image to text "
            + _recall_line(result, "image_to_text")
            + ", text to image "
            + _recall_line(result, "text_to_image")
        )
        if result.sum > self.best:
            self.best = result.sum
            self.save("best")

    def retrieval(self, table: PairSource, max_images: int | None = None) -> RetrievalResult:
        """Zero-shot retrieval over a table with the settings of ``config.evaluation``."""
        evaluation = self.config.evaluation
        return evaluate_retrieval(
            self.model,
            table,
            self.tokenizer,
            self.val_transform,
            batch_size=evaluation.batch_size,
            rerank=evaluation.rerank,
            max_images=max_images,
            bad_pictures=self.bad_val_pictures if table is self.val_table else self.bad_pictures,
        )

    def save(self, name: str) -> None:
        """Write ``checkpoints/<name>.pt``; weights that are not finite raise instead, and the old file stays."""
        self._check_healthy({})
        state = {
            "config": self.config.to_dict(),
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bad_pictures": self.bad_pictures.state_dict(),
        }
        save_checkpoint(self.checkpoints / f"{name}.pt", state)
        if name == "latest":
            self._saved_step = self.step

    def export(self) -> Path:
        """Write the model and its tokenizer to ``model/`` for ``SCLModel.from_pretrained``."""
        path = self.directory / "model"
        self.model.save_pretrained(path)
        try:
            self.tokenizer.save_pretrained(path)
        except Exception as error:  # the tokenizers library raises a bare Exception for a full disk
            raise UserError(f"{path}: the tokenizer cannot be written ({error}); free space, then --resume") from error
        return path

    def describe(self) -> str:
        """The run in one line: size, data, batch, negatives, steps."""
        run, config = self.config.run, self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{parameters / 1e6:.1f} M parameters, recipe {config.objectives.recipe}, {self.train_table.num_images} "
            f"pictures with {self.train_table.num_pairs} captions to train on, {self.val_table.num_images} held out; "
            f"batch {run.batch_size} x {run.accumulation}, {run.batch_size - 1} negatives for each contrast; "
            f"{run.max_steps} steps = {run.max_steps * run.accumulation / len(self.train_loader):.1f} epochs on "
            f"{self.device}, {run.precision}"
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def request_stop(*_: object) -> None:
            self._stop_requested = True

        before = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _recall_line(result: RetrievalResult, direction: str) -> str:
    method = "itm" if f"itm_{direction}_r1" in result.recalls else "itc"
    return "/".join(f"{100 * result.recalls[f'{method}_{direction}_r{k}']:.1f}" for k in (1, 5, 10)) + " %"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
