"""What a run chooses by name among libraries: whether each can run, before any work, and what its log says of it."""

from __future__ import annotations

import torch

from sclkern.errors import UserError
from sclkern.libraries import apex, flash
from sclkern.models.config import HEAD_DIM
from sclkern.training.config import PretrainConfig
from sclkern.training.optim import check_optimizer


def check_choices(config: PretrainConfig, device: torch.device) -> None:
    """Raise unless every library that a run names can run.

    Args:
        config: of the run.
        device: of the run.

    Raises:
        UserError: a library is missing, or cannot compute what the run needs; with the remedy.
    """
    run = config.run
    if run.backend == "flash":
        problems = flash.problems(device, head_dim=HEAD_DIM, dropout_p=config.model.dropout)
        if problems:
            raise UserError(f"run.backend: got 'flash', but {'; '.join(problems)}; or set it to auto")
        if run.precision != "bfloat16":
            raise UserError(
                f"run.backend: got 'flash' with run.precision={run.precision}, but flash-attn computes float16 and "
                "bfloat16; set run.precision=bfloat16, or run.backend=auto"
            )
        if run.contrastive_batch is not None and config.model.dropout > 0:
            raise UserError(
                "run.backend: got 'flash' with run.contrastive_batch, whose two passes need the same dropout masks, "
                "and flash-attn draws its own; set run.backend=auto, or model.dropout=0"
            )
    if run.layer_norm == "apex" and (problems := apex.layer_norm_problems(device)):
        raise UserError(f"run.layer_norm: got 'apex', but {'; '.join(problems)}; or set it to sclkern")
    check_optimizer(config.optimizer, device)


def describe_choices(config: PretrainConfig) -> dict[str, str]:
    """What computes attention, LayerNorm and the update of a run that passed ``check_choices``, by name."""
    backend = f"flash (flash-attn {flash.version()})" if config.run.backend == "flash" else config.run.backend
    return {"backend": backend, "layer_norm": config.run.layer_norm, "optimizer": config.optimizer.name}
