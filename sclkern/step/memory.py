"""Memory of a step, found without running it: shapes go through the model, no numbers.

``kept_bytes`` is what one sample keeps for the backward; ``estimate_memory`` is what a device holds at the peak of
training, part by part.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sclkern.errors import UserError
from sclkern.models.config import SCLConfig
from sclkern.models.layers import PostNormBlock, PreNormBlock
from sclkern.models.network import SCLNetwork
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.allocations import Allocation, Allocations
from sclkern.step.config import StepConfig
from sclkern.step.fake_cuda import autocast, backward
from sclkern.step.losses import take_step


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one device holds at the peak of a training step.

    Not in it: what the CUDA context takes (about half a gigabyte), what a fragmented allocator cannot use, and
    validation.

    Attributes:
        weights: parameters, or this rank's shard of them.
        gradients: of the parameters, those that exist at the peak.
        moments: the two of AdamW.
        batch: images, negative images and captions.
        activations: what the forward keeps for the backward, as far as it is held at the peak.
        casts: weights in the dtype of autocast.
        workspaces: what the backward holds only for a while.
        communication: what FSDP gathers. The gradients of DDP are views of its buckets.
        contrast: cached features of a contrastive batch with their gradients.
    """

    weights: float
    gradients: float
    moments: float
    batch: float
    activations: float
    casts: float
    workspaces: float
    communication: float = 0.0
    contrast: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(asdict(self).values())

    def line(self, there: float | None = None) -> str:
        """The estimate in one line, the largest parts first.

        Args:
            there: bytes that the device has, which the line shows too; None shows none.

        Returns:
            The line.
        """
        parts = sorted(asdict(self).items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts if size >= 0.005 * self.total)
        of = f" of the {there / 1e9:.3g} GB of a GPU" if there else ""
        return f"memory at the peak of a step, estimated: {self.total / 1e9:.2f} GB{of} ({shown})"


def kept_bytes(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    caption_tokens: int,
    padded_tokens: int,
    num_frames: int = 1,
    rows: int = 4,
) -> float:
    """Bytes that the forward of a training step keeps for the backward, for one sample, on a GPU in float32.

    Each storage counts once; parameters, and the batch itself, do not. The ops take the path that a GPU takes, their
    kernels where Triton is installed; no GPU is needed, and no time.

    Args:
        config: of the network.
        objectives: the recipe.
        step: how it is executed.
        caption_tokens: of every caption.
        padded_tokens: what it is padded to.
        num_frames: of every clip; 1 for images.
        rows: of the batch, which the similarities of the losses grow with.

    Returns:
        Bytes of one row.
    """
    kept: dict[int, tuple[int, Tensor]] = {}
    with FakeTensorMode(), torch.device("cuda"):
        network = _network(config, step, "auto")
        batch = _batch(config, rows, num_frames, caption_tokens, padded_tokens)
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        not_counted = {t.untyped_storage()._cdata for t in (*network.parameters(), *tensors)}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in not_counted:
                # The tensor stays, so that no other storage takes its place in memory.
                kept[storage._cdata] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # The graph must live until all is counted.
            losses = take_step(network, objectives, step, batch, 0)
        total = sum(size for size, _ in kept.values()) / rows
        del losses
    return total


def estimate_memory(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    rows: int,
    caption_tokens: int = 13,
    padded_tokens: int = 18,
    num_frames: int = 1,
    precision: Literal["float32", "bfloat16"] = "float32",
    backend: str = "auto",
    accumulation: int = 1,
    contrastive_batch: int = 0,
    world_size: int = 1,
    parallel: Literal["ddp", "fsdp"] = "ddp",
) -> MemoryEstimate:
    """Estimate what one device holds at the peak of training with AdamW.

    A step is taken on tensors without memory, forward and backward, and its allocations are recorded; what lives
    longer than a step is counted by formulas. It takes seconds, and no GPU.

    Args:
        config: of the network.
        objectives: the recipe.
        step: how it is executed.
        rows: of a micro-batch of one rank.
        caption_tokens: of a caption on average.
        padded_tokens: of the longest caption, to which all are padded.
        num_frames: of every clip; 1 for images.
        precision: of matrix products; "bfloat16" is autocast.
        backend: as of ``SCLNetwork.set_backend``: "auto" takes the kernels, "eager" what a CPU computes.
        accumulation: micro-batches of a step.
        contrastive_batch: pairs that a contrast sees by cached features; 0 caches none.
        world_size: ranks.
        parallel: how more than one rank share the work.

    Returns:
        The estimate.

    Raises:
        UserError: no row, no rank, or no micro-batch.
    """
    counts = {"rows": rows, "world_size": world_size, "accumulation": accumulation}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}: got {value}, expected 1 or more")
    sharded = world_size > 1 and parallel == "fsdp"
    # Otherwise gradients come into being in the course of the backward. Those of DDP are views of its buckets.
    lasting = accumulation > 1 or (world_size > 1 and not sharded)
    # A false image that belongs to another micro-batch is decoded and encoded for this one.
    split = world_size > 1 or accumulation > 1
    decoded = objectives.dataset_negatives or (objectives.uses_negative_images and split)
    decoded &= not objectives.hard_negatives
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    peak = _peak_of_step(
        config, objectives, step, backend, dtype, lasting, decoded,
        rows=rows, caption_tokens=caption_tokens, padded_tokens=padded_tokens, num_frames=num_frames,
    )  # fmt: skip
    images = rows * num_frames * 3 * config.image_size**2 * 4
    parts = {**peak, "moments": 2 * peak["weights"], "batch": images * (1.5 if decoded else 1)}
    parts["batch"] += 9 * rows * padded_tokens
    whole = peak["weights"]
    # The optimiser's step needs every gradient, and nothing of the forward.
    if whole - parts["gradients"] > parts["activations"] + parts["casts"] + parts["workspaces"]:
        parts |= {"gradients": whole, "activations": 0.0, "casts": 0.0, "workspaces": 0.0}
    if sharded:
        block, outside, _ = parameter_bytes(config)
        shared = ("weights", "moments") if lasting else ("weights", "moments", "gradients")
        parts |= {name: parts[name] / world_size for name in shared}
        # Gathered: a block, the next one, and what lies outside of blocks. Gradients that wait to be scattered are
        # those of a block and of the rest; without synchronisation, all.
        parts["communication"] = 2 * block + outside + (whole / world_size if lasting else block + outside)
    parts["contrast"] = 2 * 4 * contrastive_batch * contrast_features(config, objectives, num_frames)
    return MemoryEstimate(**parts)


def contrast_features(config: SCLConfig, objectives: ObjectiveConfig, num_frames: int = 1) -> int:
    """Numbers of the features of one pair that the contrasts of a recipe compare.

    Args:
        config: of the network.
        objectives: the recipe.
        num_frames: of every clip; 1 for images.

    Returns:
        Their sum over ITC (two projections), MVSC (two CLS a frame) and MLSC (two CLS).
    """
    sizes = {"itc": 2 * config.projection_dim, "mvsc": 2 * num_frames * config.width, "mlsc": 2 * config.width}
    return sum(sizes.get(objective.name, 0) for objective in objectives.selected)


def _network(config: SCLConfig, step: StepConfig, backend: str) -> SCLNetwork:
    network = SCLNetwork(config).train().set_backend(backend)
    network.execution.absorb = step.absorb
    network.execution.checkpoint_blocks = step.checkpoint_blocks
    return network


def _batch(config: SCLConfig, rows: int, num_frames: int, caption_tokens: int, padded_tokens: int) -> dict[str, Any]:
    frames = () if num_frames == 1 else (num_frames,)
    image = torch.empty(rows, *frames, 3, config.image_size, config.image_size)
    ids = torch.empty(rows, padded_tokens, dtype=torch.int64)
    tensors = {"image": image, "false_image": image, "text_ids": ids, "text_mask": ids.bool()}
    return {**tensors, "text_tokens": rows * caption_tokens}


def _placed(batch: dict[str, Any], *, decoded: bool) -> dict[str, Any]:
    """The batch as a loader of training gives it: of each two neighbours one has a false image."""
    place = torch.empty_like(batch["text_ids"][:, 0])
    false = place[: len(place) - len(place) // 2]
    placed = {**batch, "place": place, "match_labels": place}
    del placed["false_image"]
    return placed | ({"false_image": batch["image"][: len(false)]} if decoded else {"false_place": false})


@contextmanager
def _recorded() -> Iterator[Allocations]:
    with torch.random.fork_rng(devices=()), FakeTensorMode(), torch.device("cuda"), Allocations() as allocations:
        yield allocations


def _peak_of_step(
    config: SCLConfig,
    objectives: ObjectiveConfig,
    step: StepConfig,
    backend: str,
    dtype: torch.dtype | None,
    lasting: bool,
    decoded: bool,
    **sizes: int,
) -> dict[str, float]:
    """Bytes by part at the peak of forward and backward."""
    # Among processes too: tensors without values cannot be exchanged, and what others send has a part of its own.
    objectives = replace(objectives, gather=None)
    with _recorded() as allocations:
        allocations.section = "weights"
        network = _network(config, step, backend)
        allocations.section = "batch"
        batch = _batch(config, **sizes)
        if not objectives.hard_negatives:
            batch = _placed(batch, decoded=decoded)
        allocations.section = "gradients"
        parameters = list(network.parameters())
        sums: dict[Tensor, Tensor] | None = {p: torch.empty_like(p) for p in parameters} if lasting else None
        # What initial weights were computed with does not count.
        begin = len(allocations.made)
        allocations.section = "activations"
        with autocast(dtype):
            losses = take_step(network, objectives, step, batch, 0)
        # The losses by name would hold the graph, of which a step frees each node when it has run.
        total = losses.total
        del losses
        allocations.section = "workspaces"
        gradients = backward(total, sums)
        weights = {id(allocations.of(parameter)) for parameter in parameters}
        gradient_ids = {id(allocations.of(gradient)) for gradient in gradients.values()}
        shapes = {parameter.shape for parameter in parameters}

    def part(one: Allocation) -> str:
        if id(one) in gradient_ids:
            return "gradients"
        is_cast = one.dtype == dtype and one.shape in shapes
        return "casts" if is_cast and one.section == "activations" else one.section

    found = dict.fromkeys(("weights", "gradients", "activations", "casts", "workspaces"), 0.0)
    allocations.made = [one for one in allocations.made[:begin] if one.stop is None] + allocations.made[begin:]
    for one in allocations.peak()[1]:
        if part(one) in found and (one.section != "weights" or id(one) in weights):
            found[part(one)] += one.bytes
    return found


class ParameterBytes(NamedTuple):
    """Bytes of parameters as FSDP gathers them.

    Attributes:
        block: the largest block.
        outside: all that lies outside of blocks.
        total: all.
    """

    block: int
    outside: int
    total: int


@functools.lru_cache(maxsize=16)
def parameter_bytes(config: SCLConfig) -> ParameterBytes:
    """Count the bytes of a network's parameters in float32.

    Args:
        config: of the network.

    Returns:
        The bytes.
    """
    with torch.device("meta"):
        network = SCLNetwork(config)
    blocks = [module for module in network.modules() if isinstance(module, PreNormBlock | PostNormBlock)]
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
    total = sum(parameter.nbytes for parameter in network.parameters())
    return ParameterBytes(max(sizes, default=0), total - sum(sizes), total)
