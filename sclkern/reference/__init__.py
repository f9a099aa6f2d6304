"""The eager definition of every op in plain PyTorch, the ground truth for the tests. One file for each op.

It runs in any floating dtype (float64 for the truth of a test), supports double backward, and is the CPU path.

Dimensions: B batch, L length (Lq of queries, Lk of keys), H heads, D channels of a head or width of a feature,
F frames, P patches of a frame, K kept patches, N rows of a contrast, G groups of rows, V vocabulary.
"""

from sclkern.reference.attention import (
    attention,
    attention_dropout_mask,
    attention_dropout_threshold,
    attention_log_sum_exp,
    attention_probabilities,
    frame_attention,
    frame_attention_mask,
    packed_attention,
)
from sclkern.reference.bias_gelu import bias_gelu
from sclkern.reference.completion_loss import completion_loss, reduce_rows
from sclkern.reference.cross_attention import cross_attention
from sclkern.reference.dropout_add_layer_norm import (
    dropout_add_layer_norm,
    feature_dropout_keep,
    feature_dropout_scale,
    feature_dropout_threshold,
)
from sclkern.reference.embed_patches import embed_patches
from sclkern.reference.linear_cross_entropy import linear_cross_entropy
from sclkern.reference.masking import MaskedText, mask_text, select_patches, select_tokens
from sclkern.reference.sigmoid_loss import sigmoid_loss

__all__ = [
    "MaskedText",
    "attention",
    "attention_dropout_mask",
    "attention_dropout_threshold",
    "attention_log_sum_exp",
    "attention_probabilities",
    "bias_gelu",
    "completion_loss",
    "cross_attention",
    "dropout_add_layer_norm",
    "embed_patches",
    "feature_dropout_keep",
    "feature_dropout_scale",
    "feature_dropout_threshold",
    "frame_attention",
    "frame_attention_mask",
    "linear_cross_entropy",
    "mask_text",
    "packed_attention",
    "reduce_rows",
    "select_patches",
    "select_tokens",
    "sigmoid_loss",
]
