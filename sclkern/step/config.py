"""How a step is executed; no option changes a loss or a gradient, but for dropout drawing other numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sclkern.errors import UserError


@dataclass(frozen=True)
class StepConfig:
    """Options of the execution; each can be turned off alone, and the published code has none of them.

    Attributes:
        share_encodings: what is encoded once for all passes that read it. "images": each image variant, which changes
            nothing, as the image encoder has no dropout; each view has texts, and dropout in them, of its own, and the
            contrast reads those of ITM. "all": each text variant too, whose readers then share its dropout. "none":
            every reader encodes anew.
        pack: run all variants of a modality, and all views, in one batch without padding; else a call for each, padded.
        prune_last_layer: compute in the last fusion layer only the tokens that some loss reads.
        absorb: multiply projections of cross-attention into the shorter side where that is less arithmetic: "auto" or
            "never".
        checkpoint_blocks: keep the input of each block alone and compute the rest again in the backward: about a third
            more arithmetic for a fraction of the memory.
    """

    share_encodings: Literal["all", "images", "none"] = "images"
    pack: bool = True
    prune_last_layer: bool = True
    absorb: Literal["auto", "never"] = "auto"
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        if self.absorb not in ("auto", "never"):
            raise UserError(f"absorb: got {self.absorb!r}, expected 'auto' or 'never'")
        if self.share_encodings not in ("all", "images", "none"):
            raise UserError(f"share_encodings: got {self.share_encodings!r}, expected 'all', 'images' or 'none'")

    @classmethod
    def reference(cls) -> StepConfig:
        """Separate padded passes, each encoding anew, as the published code runs them."""
        return cls(share_encodings="none", pack=False, prune_last_layer=False, absorb="never")
