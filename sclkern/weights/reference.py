"""Published SCL and METER checkpoints: into a network, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sclkern.errors import UserError
from sclkern.models import SCLConfig
from sclkern.weights.files import read_tensors, select_weights
from sclkern.weights.loading import LoadReport, NetworkT, changed, fill, on_cpu, part_changes, part_of
from sclkern.weights.names import (
    DEAD,
    gather,
    infer_config,
    optional_parts,
    reference_names,
    split_to_reference,
)
from sclkern.weights.prefixes import PUBLISHED, without_prefix
from sclkern.weights.saving import saved_weights, unwrapped


def from_reference(
    build: Callable[[SCLConfig], NetworkT],
    source: str | Path | Mapping[str, Tensor],
    *,
    strict: bool = True,
    config: SCLConfig | None = None,
    **changes: Any,
) -> tuple[NetworkT, LoadReport]:
    """Build a network with the weights of a published SCL or METER checkpoint.

    Where the network has what the checkpoint does not, the rules are those of the published code:

    - another ``image_size``: positions are resized bicubically, without antialiasing;
    - ``max_frames`` on an image checkpoint: a temporal table of zeros, which leaves the features of images unchanged;
      fewer frames than the checkpoint's table: its first rows;
    - the head "nlvr2": the third token type copies the second; the head "rank": row 1 of the matching head; other
      heads and the patch mask token: as in a new network.

    Heads of the checkpoint that ``heads`` does not name are dropped. All of this is in the report, which is also logged
    (logger "sclkern.weights").

    Args:
        build: makes the network of a config: ``SCLNetwork``, or what the classmethods of ``SCLModel`` pass.
        source: a file or directory that ``read_tensors`` takes, or tensors by name in any floating dtype. Names are
            SCL's or METER's; one prefix under which they stand ("model.", "student.module.", ...) is taken off, and
            what torch.compile puts into names. Beside the weights there may be anything.
        strict: whether a missing or unexpected tensor is an error; otherwise it is in the report.
        config: the sizes; None infers them from the tensors.
        **changes: fields of ``SCLConfig``; None changes nothing.

    Returns:
        The network, in float32 on the CPU, in training mode, and the report.

    Raises:
        UserError: the source cannot be read, is no such checkpoint, has a tensor of another shape, or, with ``strict``,
            lacks tensors or has unexpected ones. A table of temporal positions is unexpected in a network without
            ``max_frames``, because images would lose its first row.
    """
    if not isinstance(source, str | Path | Mapping):
        raise UserError(f"source: got {type(source).__name__}, expected a path, or tensors by name (a state_dict)")
    where = "state_dict" if isinstance(source, Mapping) else str(source)
    given = select_weights(source, where) if isinstance(source, Mapping) else read_tensors(source)
    tensors, where = reference_keys(given, where)
    base = config or infer_config(tensors, where)
    target = changed(base, changes)
    published = base.replace(**optional_parts(tensors))
    gathered = gather(reference_names(published) | reference_names(target), tensors, where)

    network = on_cpu(build, target)
    fresh_parts, dropped_parts = part_changes(published, target)
    parameters = network.state_dict().keys()
    surplus = {name: part_of(name) in dropped_parts for name in gathered.tensors if name not in parameters}
    ignored = [key for key in gathered.unused if DEAD.match(key)]
    ignored += [key for name, dropped in surplus.items() if dropped for key in gathered.names[name]]
    unexpected = [key for key in gathered.unused if not DEAD.match(key)]
    unexpected += [key for name, dropped in surplus.items() if not dropped for key in gathered.names[name]]
    report = fill(
        network,
        gathered.tensors,
        names=gathered.names,
        fresh={name for name in parameters if part_of(name) in fresh_parts},
        report=LoadReport(
            0, unexpected=tuple(unexpected), ignored=tuple(ignored), dropped=tuple(sorted(dropped_parts))
        ),
        where=where,
        strict=strict,
    )
    return network, report


def to_reference(network: nn.Module) -> dict[str, Tensor]:
    """Copy the weights of a network under the published names and shapes; ``from_reference`` restores the network.

    Args:
        network: an ``SCLNetwork`` or ``SCLModel``, also in torch.compile, DistributedDataParallel or DataParallel.

    Returns:
        Tensors by published name.

    Raises:
        UserError: the network's vision activation is not that of the published code, or its weights cannot be saved
            (see ``saving.saved_weights``).
    """
    config = unwrapped(network).config
    if config.vision_activation != "quick_gelu":
        raise UserError(
            f"vision_activation: got {config.vision_activation!r}, expected 'quick_gelu', the activation of "
            "published checkpoints; use save_pretrained, which keeps the config"
        )
    published = split_to_reference(config, saved_weights(network))
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in published.items()}


def reference_keys(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], str]:
    """Take off wrappers' prefixes, and give METER's ``vit_model`` the name that SCL uses; also returns the source, with
    the prefix if some names do not have it."""
    renamed, where = without_prefix(tensors, PUBLISHED, where)
    meter = "vit_model."
    return {
        "vision_transformer." + key[len(meter) :] if key.startswith(meter) else key: tensor
        for key, tensor in renamed.items()
    }, where
