"""The contrastive loss of Hugging Face's CLIP and BLIP models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sclkern import ops
from sclkern.integrations.fuse.modules import Fused, Swap, Verdict, fused_class
from sclkern.integrations.huggingface.fusing import forward_names


class FusedContrast(Fused):
    """CLIP's and BLIP's model with an image-text contrastive loss, computed by ``ops.completion_loss``."""

    config: Any
    logit_scale: Tensor

    def forward(self, *args, **options):
        """Compute the model without its loss, then the loss."""
        as_tuple = options.get("return_dict", getattr(self.config, "return_dict", True)) is False
        if as_tuple or not options.get("return_loss"):
            return super().forward(*args, **options)
        out = super().forward(*args, **{**options, "return_loss": False})
        loss = ops.completion_loss(
            out.text_embeds, out.image_embeds, temperature=torch.exp(-self.logit_scale), gather=None
        )
        # The op adds the two directions; these models average them.
        return type(out)(**{**out, "loss": loss / 2})


def completion_loss(module: Any) -> Verdict:
    """The contrastive loss of ``transformers.CLIPModel`` and ``BlipModel``."""
    if not forward_names(module) & {"clip_loss", "image_text_contrastive_loss"} or not hasattr(module, "config"):
        return None
    scale = getattr(module, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.ndim:
        return "it has no logit_scale"
    return Swap("ops.completion_loss", fused_class(type(module), FusedContrast), {})
