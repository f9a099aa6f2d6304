"""Fused modules with the ``state_dict`` of the torch modules they replace."""

from sclkern.nn.completion_loss import CompletionLoss
from sclkern.nn.dropout_add_layer_norm import DropoutAddLayerNorm
from sclkern.nn.linear_cross_entropy import LinearCrossEntropy
from sclkern.nn.linear_gelu import LinearGELU
from sclkern.nn.multihead_attention import MultiheadAttention
from sclkern.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "CompletionLoss",
    "DropoutAddLayerNorm",
    "LinearCrossEntropy",
    "LinearGELU",
    "MultiheadAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
