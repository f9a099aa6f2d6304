"""Published SCL and METER checkpoints: into a model, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sclkern.errors import UserError
from sclkern.models import SCLConfig, SCLNetwork
from sclkern.weights.files import read_tensors
from sclkern.weights.loading import LoadReport, NetworkT, changed, fill, part_changes, part_of
from sclkern.weights.names import (
    DEAD,
    gather,
    infer_config,
    optional_parts,
    reference_names,
    split_to_reference,
)


def from_reference(
    build: Callable[[SCLConfig], NetworkT],
    source: str | Path | Mapping[str, Tensor],
    *,
    strict: bool = True,
    config: SCLConfig | None = None,
    **changes: Any,
) -> NetworkT:
    """A model with the weights of a published SCL or METER checkpoint, in float32 on the CPU, in training mode.

    Sizes come from the tensors unless ``config`` gives them. ``changes`` are fields of ``SCLConfig``; None means as it
    is. Where the model asks for what the checkpoint's model did not have, the rules are the reference's:

    - another ``image_size``: positions resized bicubically, without antialiasing;
    - ``max_frames`` on an image checkpoint: a temporal table of zeros, so images keep their numbers; fewer frames
      than the checkpoint's table: its first rows;
    - the head "nlvr2": the third token type copies the second; the head "rank": row 1 of the matching head; other
      heads and the patch mask token: as a new model has them.

    Heads of the checkpoint that ``heads`` does not name are dropped. All of this is in the report, a ``LoadReport``,
    which is logged (logger "sclkern.weights") and kept as ``model.load_report``.

    Args:
        source: a file or directory that ``read_tensors`` takes, or tensors by name in any floating dtype. Names are
            SCL's or METER's; "model." or "module." before all of them is removed.
        strict: whether a missing or unexpected tensor is an error; else it is in the report.

    Raises:
        UserError: the source cannot be read, is no such checkpoint, has a tensor of another shape, or, with ``strict``,
            lacks tensors or has unknown ones. A table of temporal positions counts as unknown to a model without
            ``max_frames``, because images would lose its first row.
    """
    where = "state_dict" if isinstance(source, Mapping) else str(source)
    tensors = reference_keys(source if isinstance(source, Mapping) else read_tensors(source))
    base = config or infer_config(tensors, where)
    target = changed(base, changes)
    theirs = base.replace(**optional_parts(tensors))
    found, names, unused = gather(reference_names(theirs) | reference_names(target), tensors, where)

    model = build(target)
    fresh_parts, dropped_parts = part_changes(theirs, target)
    parameters = model.state_dict().keys()
    surplus = {name: part_of(name) in dropped_parts for name in found if name not in parameters}
    ignored = [key for key in unused if DEAD.match(key)]
    ignored += [key for name, dropped in surplus.items() if dropped for key in names[name]]
    unexpected = [key for key in unused if not DEAD.match(key)]
    unexpected += [key for name, dropped in surplus.items() if not dropped for key in names[name]]
    return fill(
        model,
        found,
        names=names,
        fresh={name for name in parameters if part_of(name) in fresh_parts},
        report=LoadReport(
            0, unexpected=tuple(unexpected), ignored=tuple(ignored), dropped=tuple(sorted(dropped_parts))
        ),
        where=where,
        strict=strict,
    )


def to_reference(model: SCLNetwork) -> dict[str, Tensor]:
    """The weights under the published names and shapes, copied: ``from_reference`` gives the same model again.

    Raises:
        UserError: the model's vision activation is not the published code's.
    """
    if model.config.vision_activation != "quick_gelu":
        raise UserError(
            f"vision_activation: got {model.config.vision_activation!r}, but published checkpoints mean 'quick_gelu'; "
            "use save_pretrained, which keeps the config"
        )
    published = split_to_reference(model.config, model.state_dict())
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in published.items()}


def reference_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a wrapper's prefix on all keys, and with SCL's name for what METER calls ``vit_model``."""
    tensors = dict(tensors)
    while tensors:
        prefix = next((p for p in ("model.", "module.") if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
    meter = "vit_model."
    return {
        "vision_transformer." + key[len(meter) :] if key.startswith(meter) else key: tensor
        for key, tensor in tensors.items()
    }
