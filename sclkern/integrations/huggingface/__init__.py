"""Fused attention for Hugging Face models: ``attn_implementation="sclkern"``, and what ``sclkern.fuse`` needs of them.

``transformers`` is imported inside functions: the rest of sclkern works without it, and importing it takes seconds.
"""

from sclkern.integrations.huggingface.interface import register_attention

__all__ = ["register_attention"]
