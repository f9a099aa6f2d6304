"""Size of a model: one frozen dataclass, saved beside the weights as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sclkern.errors import UserError

HEAD_DIM = 64
# What ``config.json`` says of a saved model, by which transformers finds its classes.
MODEL_TYPE = "sclkern"
HEADS = ("itm", "mlm", "itc", "vqa", "nlvr2", "rank")


@dataclass(frozen=True)
class SCLConfig:
    """Architecture of SCL (published code: config.py, clip_model.py, bert_model.py).

    Attributes:
        width: channels of every stream, a multiple of 64; the number of heads is width / 64.
        vision_layers: blocks of the vision encoder. CLIP ViT-B/16 has 12; the published code drops the last, so the
            base model has 11.
        text_layers: blocks of the text encoder.
        fusion_layers: layers of the fusion encoder, each with a block for either stream.
        image_size: side of the square input in pixels, a multiple of ``patch_size``.
        patch_size: side of a patch in pixels.
        max_frames: rows of the temporal position table; 0 for a model of images alone.
        image_temporal: temporal position of an image, or a clip of one frame, in a model with ``max_frames``: "first",
            that of a first frame, as published, or "none".
        vocab_size: rows of the token embedding, and classes of the MLM head.
        max_text_len: longest caption in tokens, ``<s>`` and ``</s>`` included.
        text_positions: rows of the text position table; RoBERTa's positions start at pad_id + 1.
        text_types: rows of the text encoder's token-type table (RoBERTa has one).
        token_types: rows of the modality table: text, image, and the second image of NLVR2.
        mlp_ratio: hidden channels of a feed-forward / width.
        dropout: dropout probability of the text encoder and the fusion encoder; the vision encoder has no dropout.
        vision_activation: activation of the vision encoder: "quick_gelu" (OpenAI's CLIP) or "gelu".
        projection_dim: channels in which the image-text contrast compares.
        patch_mask_token: whether there is a learned token that replaces patches (recipe "glscl").
        heads: which of ``HEADS`` exist.
        vqa_answers: classes of the VQA head.
        bos_id: token id of ``<s>``.
        pad_id: token id of padding.
        eos_id: token id of ``</s>``.
        mask_id: token id of ``<mask>``.
        temperature_init: starting temperature of the image-text contrast.
        init_std: standard deviation of random weights outside the vision encoder: BERT's 0.02, made for width 768; the
            demo takes about width ** -0.5 for its narrow model.
    """

    width: int = 768
    vision_layers: int = 11
    text_layers: int = 12
    fusion_layers: int = 6
    image_size: int = 288
    patch_size: int = 16
    max_frames: int = 0
    image_temporal: Literal["first", "none"] = "first"
    vocab_size: int = 50265
    max_text_len: int = 50
    text_positions: int = 514
    text_types: int = 1
    token_types: int = 2
    mlp_ratio: int = 4
    dropout: float = 0.1
    vision_activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection_dim: int = 512
    patch_mask_token: bool = True
    heads: tuple[str, ...] = ("itm", "mlm", "itc")
    vqa_answers: int = 3129
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    mask_id: int = 50264
    temperature_init: float = 0.07
    init_std: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.width <= 0 or self.width % HEAD_DIM:
            raise UserError(f"width: got {self.width}, expected a positive multiple of {HEAD_DIM} (head_dim)")
        for name in ("patch_size", "vocab_size", "max_text_len", "text_types", "mlp_ratio", "projection_dim"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if self.token_types < 2:
            raise UserError(f"token_types: got {self.token_types}, expected 2 or more (text and image)")
        if self.image_size <= 0 or self.image_size % self.patch_size:
            raise UserError(
                f"image_size: got {self.image_size}, expected a positive multiple of patch_size {self.patch_size}"
            )
        for name in ("vision_layers", "text_layers", "fusion_layers", "max_frames"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if self.max_text_len + self.pad_id + 1 > self.text_positions:
            raise UserError(
                f"text_positions: got {self.text_positions}, expected at least {self.max_text_len + self.pad_id + 1} "
                f"(max_text_len {self.max_text_len} and positions that start at {self.pad_id + 1})"
            )
        for name in ("bos_id", "pad_id", "eos_id", "mask_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UserError(
                    f"{name}: got {getattr(self, name)}, expected 0 to {self.vocab_size - 1} (vocab_size - 1)"
                )
        if unknown := set(self.heads) - set(HEADS):
            raise UserError(f"heads: got {sorted(unknown)}, expected some of {', '.join(HEADS)}")
        if self.vision_activation not in ("quick_gelu", "gelu"):
            raise UserError(f"vision_activation: got {self.vision_activation!r}, expected 'quick_gelu' or 'gelu'")
        if self.image_temporal not in ("first", "none"):
            raise UserError(f"image_temporal: got {self.image_temporal!r}, expected 'first' or 'none'")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: got {self.dropout}, expected 0 <= dropout < 1")

    @property
    def num_heads(self) -> int:
        """Attention heads of every block."""
        return self.width // HEAD_DIM

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    def replace(self, **changes: Any) -> SCLConfig:
        """A copy with some fields changed; an unknown field is a ``UserError`` that names the nearest known one."""
        return self.from_dict({**dataclasses.asdict(self), **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SCLConfig:
        """Build from plain values; an unknown key is a ``UserError`` that names the nearest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise UserError(
                    f"model.{key}: unknown key"
                    + (f", did you mean {near[0]!r}?" if near else f"; known: {sorted(known)}")
                )
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> SCLConfig:
        """``"tiny"`` for tests, ``"demo"`` for two CPU cores, ``"base"`` and ``"base_video"`` as published."""
        if name not in PRESETS:
            raise UserError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def save(self, path: Path) -> None:
        """Write every field, and the type of the model, as JSON to the file ``path``."""
        path.write_text(json.dumps({"model_type": MODEL_TYPE, **dataclasses.asdict(self)}, indent=2) + "\n")


PRESETS = MappingProxyType(
    {
        "tiny": SCLConfig(
            width=64, vision_layers=2, text_layers=2, fusion_layers=2, image_size=32, patch_size=8, vocab_size=120,
            max_text_len=16, text_positions=18, projection_dim=32, vqa_answers=10, mask_id=119,
        ),
        "demo": SCLConfig(
            width=128, vision_layers=3, text_layers=2, fusion_layers=2, image_size=64, patch_size=8, vocab_size=2048,
            max_text_len=32, text_positions=34, projection_dim=128, mask_id=2047, init_std=0.088,
        ),
        "base": SCLConfig(),
        "base_video": SCLConfig(image_size=224, max_frames=8, patch_mask_token=False),
    }
)  # fmt: skip
