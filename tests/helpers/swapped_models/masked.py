"""Models for masked language modelling, in training and with labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sclkern
from swapped_models import inputs as make
from swapped_models.table import MODELS
from swapped_models.tiny import stir, tiny

# What only newer versions of transformers have.
NEWER = ("Gte", "JinaEmbeddingsV3", "NomicBert")


def build(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model in training mode without dropout, and inputs of which every third token has a label."""
    import transformers

    cls = getattr(transformers, f"{family}ForMaskedLM", None)
    if cls is None and family in NEWER:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = tiny(cls.config_class, **MODELS[f"{family}ForMaskedLM"].sizes)
    model = stir(cls._from_config(config, **options).to(dtype)).train()
    torch.set_default_dtype(dtype)
    try:
        inputs = make.make_inputs(model, {})
    finally:
        torch.set_default_dtype(torch.float32)
    ids = inputs["input_ids"]
    labels = torch.where(torch.arange(ids.numel()).view_as(ids) % 3 == 0, ids, -100)
    return model, {**inputs, "labels": labels}


def without_logits(model: Any, **options: Any) -> tuple[Any, Any]:
    """A copy of a model, fused, and the report."""
    ours = copy.deepcopy(model)
    return ours, sclkern.fuse(ours, only="linear_cross_entropy", skip_logits=True, **options)
