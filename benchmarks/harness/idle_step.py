"""The planned step with all layers of the base model at a small width, so that most of its time is the host's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sclkern import ObjectiveConfig, SCLConfig
from sclkern.model import SCLModel
from sclkern.step import draw_masks, run_step

ROWS, TOKENS, WIDTH, IMAGE_SIZE, VOCABULARY = 4, 8, 64, 64, 200
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def step_calls(precision: str) -> dict[str, Callable[[], object]]:
    """The passes of a step in training, with negatives from the data set.

    Masks are drawn beforehand, because a driver that launches nothing would leave ids and positions undefined.

    Args:
        precision: "float32", or "bfloat16" for autocast to it.

    Returns:
        "forward" and "both".
    """
    torch.manual_seed(0)
    config = SCLConfig(
        width=WIDTH, image_size=IMAGE_SIZE, vocab_size=VOCABULARY, mask_id=VOCABULARY - 1, projection_dim=WIDTH
    )
    model = SCLModel(config, ObjectiveConfig(itm_negatives="dataset")).train()
    ids = torch.randint(5, VOCABULARY - 1, (ROWS, TOKENS))
    ids[:, 0], ids[:, -1] = config.bos_id, config.eos_id
    image = torch.randn(2, ROWS, 3, IMAGE_SIZE, IMAGE_SIZE)
    batch = {"image": image[0], "false_image": image[1], "text_ids": ids, "text_mask": torch.ones_like(ids).bool()}
    batch |= {"text_tokens": ids.numel()}
    masks, dtype = draw_masks(config, model.objectives, batch, 0), PRECISIONS[precision]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return run_step(model, model.objectives, model.step, batch, masks).total

    def both() -> None:
        torch.autograd.grad(forward(), parameters, allow_unused=True)

    return {"forward": forward, "both": both}
