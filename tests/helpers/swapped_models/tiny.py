"""Tiny configurations of transformers: every size that a configuration declares is cut down by its name."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import torch
from torch import nn

# The first pattern that is found in the name of a field decides. Widths are 64 and heads have 32 channels, as the
# kernels take them.
SIZES = (
    (r"vocab_size|^n_vocab$|^num_(text_)?tokens$", 64),
    (r"(key_value_heads|kv_heads|n_head_kv|kv_groups|num_key_value_groups)$", 2),
    (r"head_dim$|^d_kv$|^d_head$|^head_size$", 32),
    (r"heads?$", 2),
    (r"(hidden_layers|num_layers|n_layers?|layers|num_blocks|depth|mlp_layers?|feature_layer)$", 2),
    (r"(intermediate_size|ffn_dim|ffn_size|d_ff|d_inner|n_inner|inner_dim|mlp_dim|forward_hidden_size)$", 96),
    (r"(ffn_hidden_size|dim_feedforward)$", 96),
    (r"(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embed_size|proj(ection)?_dim|width)$", 64),
    (r"(hidden_channels|embedding_dim|emb_dim|attention_dim|encoder_dim|decoder_dim|feature_size|output_dim)$", 64),
    (r"((^|_)dim|projection_size|(^|_)channels|text_hidden|proj_size|lora_rank|_rank)$", 64),
    (r"mask_(time|feature)_length$", 2),
    (r"image_size$|^img_size$", 32),
    (r"patch_size$", 8),
    (r"(num_(local_)?experts|n_routed_experts|moe_num_experts)$", 4),
    (r"(num_experts_per_tok|moe_k|moe_topk|experts_per_token|num_selected_experts)$", 2),
    (r"(n_group|topk_group)$", 1),
    (r"(position_embeddings|n_positions|max_length|seq_length|max_seq_len|max_source_positions)$", 128),
)
LISTS = (
    (r"image_size$", 32),
    (r"patch_size$", 8),
    (r"depths?$|num_layers$|layers_per|num_blocks$", 1),
    (r"heads$", 2),
    (r"(sizes|dims?|channels|widths?)$", 64),
)
DROPOUT = re.compile(r"dropout|drop_rate|drop_path|_drop$|_pdrop$|layerdrop|drop_prob|dropout_p|resid_drop")
TOKENS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2,
    "image_token_id": 3, "image_token_index": 3, "video_token_id": 63, "video_token_index": 63, "audio_token_id": 62,
    "audio_token_index": 62, "vision_start_token_id": 61, "vision_end_token_id": 60, "image_start_token_id": 61,
    "image_end_token_id": 60,
}  # fmt: skip


def tiny(config: Any, dropout: dict[str, float] | None = None, **changes: Any) -> Any:
    """A small configuration without dropout.

    Args:
        config: a configuration, or its class. What it sets beyond the defaults of its class is kept.
        dropout: by name, dropout probabilities that are set wherever they are declared; the others are 0.
        **changes: fields that are set; a dictionary changes the fields of a nested configuration, whose class it may
            choose by ``model_type``.

    Returns:
        A new configuration.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    config = config() if isinstance(config, type) else config
    values: dict[str, Any] = {}
    layers = vars(config).get("num_hidden_layers", vars(config).get("num_layers"))
    for name, default in _declared(config):
        value = vars(config).get(name)
        change = changes.pop(name, None)
        nested = isinstance(value, PreTrainedConfig)
        if isinstance(change, dict) and (nested or "model_type" in change):
            options = dict(change)
            inner = CONFIG_MAPPING[options.pop("model_type")] if "model_type" in options else value
            values[name] = tiny(inner, dropout, **options)
        elif change is not None:
            values[name] = change
        elif nested:
            values[name] = tiny(value, dropout)
        elif (small := _small(name, value, dropout or {})) is not None:
            values[name] = small
        elif isinstance(value, list) and len(value) == layers and all(isinstance(item, str) for item in value):
            kinds = list(dict.fromkeys(value))[:2]
            values[name] = kinds if len(kinds) == 2 else kinds * 2
        elif isinstance(value, dict) and "mrope_section" in value:
            values[name] = value | {"mrope_section": [size // 4 for size in value["mrope_section"]]}
        elif not nested and isinstance(value, int | float | str) and default not in (value, inspect.Parameter.empty):
            values[name] = value
    if not dataclasses.is_dataclass(config):
        # Before they were dataclasses, configurations took those within them as dictionaries.
        values = {name: one.to_dict() if hasattr(one, "to_dict") else one for name, one in values.items()}
    return type(config)(**values, **changes)


def dropouts(config: Any) -> set[str]:
    """The names of all dropout probabilities in a configuration and those within it."""
    names = set()
    for name, _ in _declared(config):
        value = vars(config).get(name)
        if hasattr(value, "model_type"):
            names |= dropouts(value)
        elif isinstance(value, float) and DROPOUT.search(name):
            names.add(name)
    return names


def _declared(config: Any) -> list[tuple[str, Any]]:
    """The fields of a configuration, each with its default."""
    parameters = inspect.signature(type(config)).parameters.values()
    return [(one.name, one.default) for one in parameters if one.kind is not one.VAR_KEYWORD]


def _small(name: str, value: Any, dropout: dict[str, float]) -> Any:
    if name in TOKENS:
        return TOKENS[name] if value is None or isinstance(value, int) else None
    if isinstance(value, float) and DROPOUT.search(name):
        return dropout.get(name, 0.0)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return next((min(small, value) for pattern, small in SIZES if re.search(pattern, name)), None)
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return next(([min(small, i) for i in value] for pattern, small in LISTS if re.search(pattern, name)), None)
    return None


def stir(model: nn.Module) -> nn.Module:
    """Move every parameter away from its initial zero or one, which would hide what it does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model
