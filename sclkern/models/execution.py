"""How the modules of a network run: one object that all of them hold, so that one assignment changes them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Absorb = Literal["auto", "never"]
MODEL_BACKENDS = ("auto", "triton", "sdpa", "eager")


@dataclass
class Execution:
    """Settings that change no parameter. A network and its modules share one; a module made alone has its own.

    A copied or unpickled network shares a copy. None of it is in a ``state_dict``.

    Attributes:
        backend: one of ``MODEL_BACKENDS``; see ``SCLNetwork.set_backend``.
        absorb: whether cross-attention on packed tokens may fold projections into its shorter side, where that saves
            multiply-adds: "auto" or "never".
        checkpoint_blocks: keep only the input of each block for the backward pass, which runs the block again.
    """

    backend: str = "auto"
    absorb: Absorb = "auto"
    checkpoint_blocks: bool = False

    @property
    def op_backend(self) -> str:
        """``backend`` as the ops of ``sclkern.ops`` name it; "sdpa" is theirs only in attention."""
        return "eager" if self.backend == "sdpa" else self.backend
