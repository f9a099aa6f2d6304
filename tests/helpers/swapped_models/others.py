"""Tiny models of torch.nn, timm and open_clip, each with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ROWS, LENGTH, WIDTH, HEADS = 3, 6, 64, 2
PADDING = torch.arange(LENGTH) >= torch.tensor([[4], [6], [6]])
LAYER = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 96, "dropout": 0.0, "batch_first": True}
VIT = {"img_size": 32, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 5}
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2},
}


def attention(inputs: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """``torch.nn.MultiheadAttention`` within a module that has a name for it."""
    options = {"batch_first": True, **options}
    model = nn.MultiheadAttention(WIDTH, HEADS, **options)
    query = torch.randn(ROWS, LENGTH, WIDTH)
    key = torch.randn(ROWS, LENGTH, options.get("kdim", WIDTH))
    value = torch.randn(ROWS, LENGTH, options.get("vdim", WIDTH))
    if not options["batch_first"]:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    return model, {"query": query, "key": key, "value": value, "key_padding_mask": PADDING, **(inputs or {})}


def encoder_layer(inputs: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(**{**LAYER, **options})
    rows = torch.randn(ROWS, LENGTH, WIDTH)
    return layer, {"src": rows, "src_key_padding_mask": PADDING, **(inputs or {})}


def encoder(inputs: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    layer, inputs = encoder_layer(inputs, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False), inputs


def transformer(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    inputs = {"src": torch.randn(ROWS, LENGTH, WIDTH), "tgt": torch.randn(ROWS, 5, WIDTH)}
    padding = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    return nn.Transformer(**{**LAYER, **layers, **options}), inputs | padding | {"tgt_mask": causal}


def timm(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    import timm as library

    return library.create_model(name, pretrained=False, **{**VIT, **options}), {"x": torch.randn(ROWS, 3, 32, 32)}


def open_clip(kind: str = "CLIP", **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    from open_clip import model as library
    from open_clip.coca_model import CoCa

    cls = CoCa if kind == "CoCa" else getattr(library, kind)
    text = torch.randint(1, 63, (ROWS, 8))
    return cls(**{**CLIP, **options}), {"image": torch.randn(ROWS, 3, 32, 32), "text": text}


COCA = {
    "embed_dim": 64,
    "multimodal_cfg": {**CLIP["text_cfg"], "context_length": 7},
    "vision_cfg": {**CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**CLIP["text_cfg"], "embed_cls": True, "output_tokens": True},
}
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()
OTHERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "nn.MultiheadAttention": attention,
    "nn.MultiheadAttention, no maps": lambda: attention({"need_weights": False}),
    "nn.MultiheadAttention, maps of each head": lambda: attention({"average_attn_weights": False}),
    "nn.MultiheadAttention, length first": lambda: attention({"need_weights": False}, batch_first=False),
    "nn.MultiheadAttention, other widths": lambda: attention({"need_weights": False}, kdim=32, vdim=16),
    "nn.MultiheadAttention, no bias": lambda: attention({"need_weights": False}, bias=False),
    "nn.MultiheadAttention, bias of keys": lambda: attention({"need_weights": False}, add_bias_kv=True),
    "nn.MultiheadAttention, a zero key": lambda: attention({"need_weights": False}, add_zero_attn=True),
    "nn.MultiheadAttention, causal": lambda: attention({"need_weights": False, "attn_mask": CAUSAL}),
    "nn.MultiheadAttention, a soft mask": lambda: attention({"attn_mask": torch.randn(LENGTH, LENGTH)}),
    "nn.TransformerEncoderLayer": encoder_layer,
    "nn.TransformerEncoderLayer, GELU": lambda: encoder_layer(activation="gelu"),
    "nn.TransformerEncoderLayer, norm first": lambda: encoder_layer(activation="gelu", norm_first=True),
    "nn.TransformerEncoderLayer, no bias": lambda: encoder_layer(bias=False),
    "nn.TransformerEncoderLayer, causal": lambda: encoder_layer({"src_mask": CAUSAL, "is_causal": True}),
    "nn.TransformerEncoder": encoder,
    "nn.TransformerEncoder, norm first": lambda: encoder(activation="gelu", norm_first=True),
    "nn.Transformer": transformer,
    "nn.Transformer, norm first": lambda: transformer(activation="gelu", norm_first=True),
    "timm ViT": lambda: timm("vit_tiny_patch16_224", patch_size=8),
    "timm ViT with QK norm": lambda: timm("vit_tiny_patch16_224", patch_size=8, qk_norm=True, init_values=0.1),
    "timm DeiT": lambda: timm("deit_tiny_distilled_patch16_224", patch_size=8),
    "timm BEiT": lambda: timm("beit_base_patch16_224", patch_size=8),
    "timm EVA-02": lambda: timm("eva02_tiny_patch14_224", patch_size=8),
    "timm SigLIP": lambda: timm("vit_base_patch16_siglip_224", patch_size=8),
    "timm CaiT": lambda: timm("cait_xxs24_224", patch_size=8),
    "timm XCiT": lambda: timm("xcit_tiny_12_p8_224"),
    "open_clip CLIP": open_clip,
    "open_clip CLIP with quick GELU": lambda: open_clip(quick_gelu=True),
    "open_clip CustomTextCLIP": lambda: open_clip("CustomTextCLIP"),
    "open_clip CoCa": lambda: open_clip("CoCa", **COCA),
}
