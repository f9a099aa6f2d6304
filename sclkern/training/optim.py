"""AdamW groups and the learning-rate schedule of the reference (scl_utils.py set_schedule)."""

from __future__ import annotations

import torch
from torch import nn

from sclkern.models import SCLNetwork
from sclkern.training.config import OptimizerConfig
from sclkern.weights.names import reference_names

# Matched against the published names, because that is how the reference makes its groups.
_FUSION = "cross_modal"
_HEADS = ("vqa_classifier", "nlvr2_classifier", "mlm_score", "itm_score")
_REFERENCE_NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight")


def parameter_groups(model: SCLNetwork, config: OptimizerConfig) -> list[dict]:
    """At most six groups: body, heads and fusion, each with and without weight decay.

    Each is a dict for ``torch.optim`` with ``base_lr``, the peak rate of the group, and ``name``.
    """
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    published = reference_names(model.config)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        theirs = published[name][0]
        part = "heads" if theirs.startswith(_HEADS) else "fusion" if theirs.startswith(_FUSION) else "body"
        if config.no_decay == "reference":
            decay = not any(pattern in theirs for pattern in _REFERENCE_NO_DECAY)
        else:
            decay = not (name in norms or name.endswith("bias") or name == "temperature")
        groups.setdefault((part, decay), []).append(parameter)
    factors = {"body": 1.0, "heads": config.head_factor, "fusion": config.fusion_factor}
    return [
        {
            "name": part + ("" if decay else "_no_decay"),
            "params": parameters,
            "weight_decay": config.weight_decay if decay else 0.0,
            "lr": config.learning_rate * factors[part],
            "base_lr": config.learning_rate * factors[part],
        }
        for (part, decay), parameters in groups.items()
    ]


def build_optimizer(model: SCLNetwork, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW where the parameters' device has it, which the CPU does too."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, eps=config.eps, fused=True)


def schedule_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Factor of the peak rate for the optimiser step with this index (0 is the first): linear warm-up from 0, then
    polynomial decay to ``end_factor`` at ``max_steps``."""
    warmup = int(max_steps * config.warmup)
    if step < warmup:
        return step / warmup
    left = 1 - (step - warmup) / max(1, max_steps - warmup)
    return config.end_factor + (1 - config.end_factor) * max(0.0, left) ** config.decay_power


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
