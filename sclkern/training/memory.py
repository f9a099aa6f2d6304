"""The memory of a run: its estimate, and what a process holds."""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Sequence

import torch

from sclkern.step.memory import MemoryEstimate, estimate_memory
from sclkern.training.config import PretrainConfig
from sclkern.training.throughput import Throughput

# Tokens of a caption, and of the longest of a batch, where the captions are not known: those of COCO.
CAPTION_TOKENS, PADDED_TOKENS = 13, 18

_estimate = functools.lru_cache(maxsize=64)(estimate_memory)


def memory_of_run(
    config: PretrainConfig,
    *,
    world_size: int = 1,
    device: str = "cuda",
    caption_tokens: int = CAPTION_TOKENS,
    padded_tokens: int = PADDED_TOKENS,
    num_frames: int = 1,
) -> MemoryEstimate:
    """Estimate what each device of a run holds at the peak of a step.

    Args:
        config: of the run.
        world_size: ranks.
        device: type of the devices: "cuda" takes the path of the kernels, "cpu" the eager one.
        caption_tokens: of a caption on average.
        padded_tokens: of the longest caption of a batch.
        num_frames: of every clip; 1 for images.

    Returns:
        The estimate.
    """
    run = config.run
    kernels = device == "cuda" and run.backend in ("auto", "triton")
    return _estimate(
        config.model,
        config.objectives,
        config.step,
        rows=run.batch_size,
        caption_tokens=min(caption_tokens, config.model.max_text_len),
        padded_tokens=min(padded_tokens, config.model.max_text_len),
        num_frames=num_frames,
        precision=run.precision,
        # Attention of torch and of flash-attn keeps what that of the kernels keeps.
        backend="auto" if kernels or run.backend in ("sdpa", "flash") else "eager",
        accumulation=run.accumulation,
        contrastive_batch=run.contrastive_batch or 0,
        world_size=world_size,
        parallel=run.parallel,
    )


def describe_cost(
    config: PretrainConfig, throughput: Throughput, lengths: Sequence[int], device: torch.device, world_size: int
) -> str:
    """Planned arithmetic and memory of a run in one line.

    Args:
        config: of the run.
        throughput: of the run, for its FLOPs.
        lengths: tokens of a sample of the captions.
        device: that trains.
        world_size: processes.

    Returns:
        The line; on a GPU with the memory that it has, and what to change if that is too little.
    """
    run = config.run
    pairs = world_size * run.batch_size * run.accumulation
    flops, first_pass = throughput.flops, throughput.first_pass
    shown = f"planned: {flops / 1e9:.3g} GFLOP a pair, {pairs * flops / 1e12:.3g} TFLOP a step"
    if first_pass:
        shown += f" and {pairs * first_pass / 1e12:.3g} in the first pass of its contrastive batch"
    try:
        memory = memory_of_run(
            config,
            world_size=world_size,
            device=device.type,
            caption_tokens=round(sum(lengths) / len(lengths)),
            padded_tokens=max(lengths),
            num_frames=throughput.num_frames,
        )
    except Exception as error:  # no run may end because it cannot be estimated
        return f"{shown}; memory cannot be estimated ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    shown += f"; {memory.line(there)}"
    if there is not None and memory.total > there:
        checkpointed = config.step.checkpoint_blocks
        shown += f"; set a smaller run.batch_size{'' if checkpointed else ' or step.checkpoint_blocks=true'}"
        shown += ", and a larger run.accumulation for the same batch of a step"
    return shown


def held_bytes(device: torch.device) -> int:
    """The most bytes that this process has held: on a GPU those of tensors, otherwise its resident memory.

    Args:
        device: that trains.

    Returns:
        Bytes since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak if sys.platform == "darwin" else 1024 * peak
