"""How the modules of a network run: one object that all of them hold, so that one assignment changes them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Absorb = Literal["auto", "all", "never"]
MODEL_BACKENDS = ("auto", "triton", "sdpa", "flash", "eager")
LAYER_NORMS = ("sclkern", "torch", "apex")


@dataclass
class Execution:
    """Settings that change no parameter. A network and its modules share one; a module made alone has its own.

    A copied or unpickled network shares a copy. None of it is in a ``state_dict``.

    Attributes:
        backend: one of ``MODEL_BACKENDS``; see ``SCLNetwork.set_backend``.
        absorb: whether cross-attention on packed tokens may fold projections into its shorter side, where that saves
            multiply-adds: "auto", "all" or "never". "auto" leaves few queries to the packed call of all groups where
            kernels run with dropout, because absorbing into them takes many more launches.
        checkpoint_blocks: keep only the input of each block for the backward pass, which runs the block again.
        layer_norm: one of ``LAYER_NORMS``; see ``SCLNetwork.set_layer_norm``.
    """

    backend: str = "auto"
    absorb: Absorb = "auto"
    checkpoint_blocks: bool = False
    layer_norm: str = "sclkern"

    @property
    def op_backend(self) -> str:
        """``backend`` of the ops that are no attention."""
        return {"sdpa": "eager", "flash": "auto"}.get(self.backend, self.backend)
