"""How a step is executed. No option changes a loss or a gradient, except that dropout draws other numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sclkern.errors import UserError


@dataclass(frozen=True)
class StepConfig:
    """Options of the execution; each can be turned off alone, and the published code has none of them.

    Attributes:
        share_encodings: what is encoded once for all its consumers. "images": each image variant, which changes
            nothing, because the image encoder has no dropout; each view has its own text encodings, hence its own
            dropout in them, and ITC reads those of ITM. "all": each text variant too, whose consumers then share its
            dropout. "none": nothing; every consumer encodes anew.
        pack: run all variants of a modality, and all views, in one batch without padding; otherwise one padded call for
            each.
        prune_last_layer: compute in the last fusion layer only the tokens that some loss reads.
        absorb: fold projections of cross-attention into the shorter side where that is less arithmetic: "auto", "all"
            (on a GPU in training also where that is the queries, in many more launches) or "never".
        checkpoint_blocks: keep only the input of each block and recompute the rest in the backward: about a third more
            arithmetic for a fraction of the memory.
    """

    share_encodings: Literal["all", "images", "none"] = "images"
    pack: bool = True
    prune_last_layer: bool = True
    absorb: Literal["auto", "all", "never"] = "auto"
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        if self.absorb not in ("auto", "all", "never"):
            raise UserError(f"absorb: got {self.absorb!r}, expected 'auto', 'all' or 'never'")
        if self.share_encodings not in ("all", "images", "none"):
            raise UserError(f"share_encodings: got {self.share_encodings!r}, expected 'all', 'images' or 'none'")

    @classmethod
    def published(cls) -> StepConfig:
        """Run separate padded passes, each encoding anew, as the published code does.

        Returns:
            The options.
        """
        return cls(share_encodings="none", pack=False, prune_last_layer=False, absorb="never")
