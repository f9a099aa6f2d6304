"""What a step keeps for its backward, found without running it: shapes go through the model, no numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sclkern.models.config import SCLConfig
from sclkern.models.network import SCLNetwork
from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.config import StepConfig
from sclkern.step.losses import take_step


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
        network = SCLNetwork(config).train()
        network.execution.absorb = step.absorb
        network.execution.checkpoint_blocks = step.checkpoint_blocks
        image = torch.empty(rows, num_frames, 3, config.image_size, config.image_size)
        ids = torch.empty(rows, padded_tokens, dtype=torch.int64)
        tensors = {"image": image, "false_image": image, "text_ids": ids, "text_mask": ids.bool()}
        batch = {**tensors, "text_tokens": rows * caption_tokens}
        not_counted = {t.untyped_storage()._cdata for t in (*network.parameters(), *tensors.values())}

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
