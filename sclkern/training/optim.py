"""AdamW by name, its published parameter groups, and the learning-rate schedule (``set_schedule`` in scl_utils.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sclkern.errors import UserError
from sclkern.libraries import apex
from sclkern.models import SCLNetwork
from sclkern.training.config import OptimizerConfig
from sclkern.weights.names import reference_names

# Matched against the published parameter names, from which the published code makes its groups.
_FUSION = "cross_modal"
_HEADS = ("vqa_classifier", "nlvr2_classifier", "mlm_score", "itm_score")
_REFERENCE_NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight")


def parameter_groups(model: SCLNetwork, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the parameters: body, heads and fusion, each with and without weight decay.

    Args:
        model: its parameters that require a gradient.
        config: learning rates and weight decay.

    Returns:
        At most six groups for ``torch.optim``, each with ``name`` and ``base_lr``, the peak rate of the group.
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
        published_name = published[name][0]
        part = _part(published_name)
        if config.no_decay == "published":
            decay = not any(pattern in published_name for pattern in _REFERENCE_NO_DECAY)
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


def _part(published_name: str) -> str:
    if published_name.startswith(_HEADS):
        return "heads"
    return "fusion" if published_name.startswith(_FUSION) else "body"


def build_optimizer(model: SCLNetwork, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the groups of ``parameter_groups``, the one that ``config.name`` names.

    Args:
        model: on its device.
        config: of the optimizer.

    Returns:
        torch's fused AdamW, which it has for CPUs and GPUs, or apex's FusedAdam.

    Raises:
        UserError: apex, or what it needs, is missing.
    """
    groups = parameter_groups(model, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    device = next(model.parameters()).device
    check_optimizer(config, device)
    return apex.build_adam(groups, device, betas=config.betas, eps=config.eps)


def check_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """Raise a ``UserError`` unless the optimizer can update parameters on a device."""
    if config.name == "apex" and (problems := apex.adam_problems(device)):
        raise UserError(f"optimizer.name: got 'apex', but {'; '.join(problems)}; or set it to adamw")


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Steps that an optimizer has counted: torch's with each parameter, apex's with each group."""
    counts = [entry["step"] for entry in (*optimizer.state.values(), *optimizer.param_groups) if "step" in entry]
    return max(map(int, counts), default=0)


def schedule_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Compute the factor of the peak rates at a step.

    Args:
        step: index of the optimiser step, from 0.
        max_steps: steps of the schedule.
        config: warm-up, end factor and power.

    Returns:
        A factor that rises linearly from 0, then decays polynomially to ``end_factor`` at ``max_steps``.
    """
    warmup = int(max_steps * config.warmup)
    if step < warmup:
        return step / warmup
    left = 1 - (step - warmup) / max(1, max_steps - warmup)
    return config.end_factor + (1 - config.end_factor) * max(0.0, left) ** config.decay_power


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to ``factor`` times its ``base_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
