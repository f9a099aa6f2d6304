"""The fused ops as functions. ``explain`` says which path a call takes and why; ``OPS`` holds every op by name."""

from sclkern.ops._registration import OPS as OPS
from sclkern.ops._registration import explain as explain
from sclkern.ops.attention import attention as attention
from sclkern.ops.bias_gelu import bias_gelu as bias_gelu
from sclkern.ops.completion_loss import completion_loss as completion_loss
from sclkern.ops.cross_attention import cross_attention as cross_attention
from sclkern.ops.dropout_add_layer_norm import dropout_add_layer_norm as dropout_add_layer_norm
from sclkern.ops.embed_patches import embed_patches as embed_patches
from sclkern.ops.frame_attention import frame_attention as frame_attention
from sclkern.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from sclkern.ops.masking import mask_text as mask_text
from sclkern.ops.masking import select_patches as select_patches
from sclkern.ops.masking import select_tokens as select_tokens
from sclkern.ops.packed_attention import packed_attention as packed_attention
from sclkern.ops.sigmoid_loss import sigmoid_loss as sigmoid_loss

__all__ = ["OPS", "explain", *OPS]
