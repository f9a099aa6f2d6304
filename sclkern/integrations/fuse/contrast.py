"""The contrastive loss of Hugging Face's CLIP and BLIP models."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import ops
from sclkern.integrations.fuse.modules import Fused, Swap, Verdict, fused_class
from sclkern.integrations.source import source_digest

CONTRAST = "ops.completion_loss"
_LOSS = re.compile(r"\w*clip_loss|image_text_contrastive_loss")
# Digests of the two forms that transformers 5.0 to 5.24 have: the mean of the cross-entropies of both directions.
_LOSSES = ("6e5775632d452c54", "79ea9786d7f01f99")
# What a forward may do with the features, the scale and the logits from the normalisation on.
_NORM = r"(_get_vector_norm\(X\)|X\.norm\((p=2, )?dim=-1, keepdim=True\))"
_STEPS = {
    "image_embeds": "image_embeds / " + _NORM.replace("X", "image_embeds"),
    "text_embeds": "text_embeds / " + _NORM.replace("X", "text_embeds"),
    "logit_scale": r"self\.logit_scale\.exp\(\)(\.to\(device=text_embeds\.device\))?",
    "logits_per_text": (
        r"torch\.matmul\(text_embeds, image_embeds\.t\(\)(\.to\(text_embeds\.device\))?\)( \* logit_scale)?"
        r"|logits_per_text \* self\.logit_scale\.exp\(\)\.to\(text_embeds\.device\)"
    ),
    "loss": rf"None|({_LOSS.pattern})\(logits_per_text\)",
}
_MOVED = re.compile(r"image_embeds\.to\(device=text_embeds\.device, dtype=text_embeds\.dtype\)")


class FusedContrast(Fused):
    """CLIP's and BLIP's model with an image-text contrastive loss, computed by ``ops.completion_loss``."""

    config: Any
    logit_scale: Tensor

    def forward(self, *args, **options):
        """Compute the model without its loss, then the loss."""
        gather = self.__dict__.get("_sclkern")
        if gather is not None:
            # However it is called: the model's own loss knows no other rank.
            names = list(inspect.signature(self._original.forward).parameters)[1:]
            options, args = {**dict(zip(names, args, strict=False)), **options}, ()
        as_tuple = returns_tuple(self, options)
        if (as_tuple and gather is None) or not options.get("return_loss"):
            return super().forward(*args, **options)
        out = super().forward(*args, **{**options, "return_loss": False, "return_dict": True})
        loss = ops.completion_loss(
            out.text_embeds,
            out.image_embeds,
            temperature=torch.exp(-self.logit_scale),
            gather=gather,
        )
        # The op returns float32; cross_entropy returns the dtype of the logits, or what autocast makes of it.
        logit = out.logits_per_text.detach()[:1, :1]
        dtype = F.cross_entropy(logit, torch.zeros(len(logit), dtype=torch.int64, device=logit.device)).dtype
        # The op adds the two directions; these models average them.
        out = type(out)(**{**out, "loss": (loss / 2).to(dtype)})
        return out.to_tuple() if as_tuple else out


def returns_tuple(model: Any, options: dict[str, Any]) -> bool:
    """Whether a model of transformers returns a tuple from a call.

    Args:
        model: the model.
        options: arguments of the call by name.

    Returns:
        What ``return_dict`` says, or else the model's configuration.
    """
    chosen = options.get("return_dict")
    return not (getattr(model.config, "return_dict", True) if chosen is None else chosen)


def completion_loss(module: Any) -> Verdict:
    """The contrastive loss of ``transformers.CLIPModel`` and ``BlipModel``."""
    forward = inspect.unwrap(type(module).forward)
    names = [name for name in getattr(getattr(forward, "__code__", None), "co_names", ()) if _LOSS.fullmatch(name)]
    if not names or not hasattr(module, "config"):
        return None
    scale = getattr(module, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.ndim:
        return "it has no logit_scale"
    if source_digest(forward.__globals__.get(names[0])) not in _LOSSES or not _is_contrast(forward):
        return "its loss is not known to be that of its normalised text_embeds and image_embeds"
    calls = "calls with return_loss=True that return no tuple; others have no loss, or the model's own"
    return Swap(CONTRAST, fused_class(type(module), FusedContrast), {}, calls=calls)


def gathering(swap: Swap, gather: str | None) -> Swap:
    """The swap of a contrastive loss whose features come from all ranks.

    Args:
        swap: of ``completion_loss``.
        gather: as in ``fuse``.

    Returns:
        The swap.
    """
    if gather is None:
        return swap
    calls = f"{swap.calls}; contrasts with the features of all ranks ({gather})"
    return swap._replace(attributes={**swap.attributes, "_sclkern": gather}, calls=calls)


def _is_contrast(forward: Any) -> bool:
    """Whether a forward computes its loss from the features that it returns, in a way that is known."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    seen: dict[str, list[str]] = {name: [] for name in _STEPS}
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target) in seen:
            return False
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in seen:
            seen[ast.unparse(node.targets[0])].append(ast.unparse(node.value))
    for name in ("image_embeds", "text_embeds"):
        values = [value for value in seen[name] if not _MOVED.fullmatch(value)]
        # What comes before the normalisation makes the features.
        seen[name] = values[-1:]
    known = all(re.fullmatch(_STEPS[name], value) for name, values in seen.items() for value in values)
    scaled = sum("logit_scale" in value for value in seen["logits_per_text"])
    returned = "text_embeds=text_embeds, image_embeds=image_embeds" in ast.unparse(tree)
    return known and scaled == 1 and returned and bool(seen["image_embeds"] and seen["text_embeds"])
