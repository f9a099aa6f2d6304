"""Filling a network with tensors under our names, and the report of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sclkern.errors import UserError
from sclkern.models import SCLConfig, SCLNetwork

NetworkT = TypeVar("NetworkT", bound=SCLNetwork)

logger = logging.getLogger("sclkern.weights")


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors and of the network's parameters.

    Attributes:
        loaded: number of parameters that hold values of the checkpoint.
        missing: our names that keep their initial values although the checkpoint should have them (``strict=False``).
        unexpected: the checkpoint's names that match no parameter (``strict=False``).
        ignored: the checkpoint's names that are skipped by rule: unused weights, and the parts in ``dropped``.
        resized: tables whose number of rows changed, as ``"vision.position 197 -> 325"``.
        initialised: parts that the network has and the checkpoint does not, and from what, as
            ``"vision.temporal (zeros)"``.
        dropped: parts of the checkpoint that the network does not have.
    """

    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.loaded} parameters loaded"]
        for field in ("resized", "initialised", "dropped", "missing", "unexpected", "ignored"):
            if names := getattr(self, field):
                parts.append(f"{field}: {listing(names)}")
        return "; ".join(parts)


def listing(names: Collection[str], show: int = 8) -> str:
    """The first names and the count of the rest."""
    names = list(names)
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + more


def parts(config: SCLConfig) -> set[str]:
    """The optional parts of a network: its heads, "vision.temporal", "vision.mask_token"."""
    vision = {"vision.temporal": config.max_frames, "vision.mask_token": config.patch_mask_token}
    return {*config.heads, *(name for name, present in vision.items() if present)}


def part_of(name: str) -> str | None:
    """The optional part that a parameter of ours belongs to."""
    if name in ("vision.temporal", "vision.mask_token"):
        return name
    module = name.split(".")[0]
    if module in ("text_projection", "image_projection", "temperature"):
        return "itc"
    return module.removesuffix("_head") if module.endswith("_head") else None


def part_changes(source: SCLConfig, target: SCLConfig) -> tuple[set[str], set[str]]:
    """Parts that must be initialised, and parts that may be dropped, to fill one network from another.

    The temporal table is dropped only where ``image_temporal`` is "none": else its first row is in the features of
    every image.
    """
    kept = {"vision.temporal"} if source.image_temporal == "first" else set()
    return parts(target) - parts(source), parts(source) - parts(target) - kept


def resize_positions(position: Tensor, grid: int) -> Tensor:
    """Resize (1 + P, D) positions to (1 + grid^2, D), bicubic without antialiasing as published; the CLS row stays."""
    from timm.layers import resample_abs_pos_embed  # takes seconds, and most checkpoints need no resizing

    return resample_abs_pos_embed(position.float()[None], [grid, grid], antialias=False)[0]


def changed(config: SCLConfig, changes: Mapping[str, Any]) -> SCLConfig:
    """The config with the changes that are not None, and the third token type that an NLVR2 head needs."""
    config = config.replace(**{key: value for key, value in changes.items() if value is not None})
    return config.replace(token_types=3) if "nlvr2" in config.heads and config.token_types < 3 else config


def on_cpu(build: Callable[[SCLConfig], NetworkT], config: SCLConfig) -> NetworkT:
    """Build a network on the CPU, whatever the present default device is: on "meta" it would not take the weights."""
    with torch.device("cpu"):
        return build(config)


def fill(
    network: SCLNetwork,
    tensors: Mapping[str, Tensor],
    *,
    names: Mapping[str, tuple[str, ...]],
    fresh: Collection[str],
    report: LoadReport,
    where: str,
    strict: bool,
) -> LoadReport:
    """Load tensors into a network after fitting tables to its config.

    Args:
        network: its parameters are overwritten.
        tensors: by our names, any floating dtype; leading dimensions of 1 do not matter. Names that the network does
            not have are left out.
        names: our names -> the checkpoint's (of a missing one, those that are absent), for messages.
        fresh: our names that may keep their initial values because the checkpoint's network did not have them.
        report: what the caller knows already: ignored, unexpected, dropped.
        where: the source, for messages.
        strict: whether a missing or an unexpected tensor is an error.

    Returns:
        The report, which is also logged (logger "sclkern.weights").

    Raises:
        UserError: a wrong shape or dtype; with ``strict``, a missing or an unexpected tensor.
    """
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    loadable = {name: _squeezed(tensors[name], len(shapes[name])) for name in shapes if name in tensors}
    loaded = len(loadable)
    resized, initialised = _fit(loadable, tensors, network.config, fresh)
    new = [name for name in shapes if name not in loadable and name in fresh]
    initialised += sorted({name if name.startswith("vision.") else name.split(".")[0] for name in new})
    missing = tuple(name for name in shapes if name not in loadable and name not in fresh)
    for name, tensor in loadable.items():
        theirs = " + ".join(names.get(name, (name,)))
        if tensor.shape != shapes[name]:
            raise UserError(
                f"{where}: {theirs} has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])} for {name}; "
                "this is a checkpoint of another architecture, or the config is not its own"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {theirs} has dtype {tensor.dtype}, expected a floating dtype")
    if strict and (missing or report.unexpected):
        raise UserError(_strict_message(where, missing, names, report))
    network.load_state_dict(loadable, strict=False)
    report = replace(report, loaded=loaded, missing=missing, resized=tuple(resized), initialised=tuple(initialised))
    level = logging.WARNING if missing or report.unexpected else logging.INFO
    logger.log(level, "%s: %s", where, report)
    return report


def _fit(
    loadable: dict[str, Tensor], tensors: Mapping[str, Tensor], config: SCLConfig, fresh: Collection[str]
) -> tuple[list[str], list[str]]:
    """Resize and extend tables in ``loadable``; returns what was resized and what was initialised."""
    resized, initialised = [], []
    position = loadable.get("vision.position")
    if position is not None and position.ndim == 2 and position.shape[1] == config.width:
        rows, wanted = len(position), 1 + config.num_patches
        if rows != wanted and rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1:
            loadable["vision.position"] = resize_positions(position, config.grid)
            resized.append(f"vision.position {rows} -> {wanted}")
    temporal = loadable.get("vision.temporal")
    if temporal is not None and temporal.ndim == 2 and len(temporal) > config.max_frames:
        loadable["vision.temporal"] = temporal[: config.max_frames]
        resized.append(f"vision.temporal {len(temporal)} -> {config.max_frames}")
    if temporal is None and config.max_frames and "vision.temporal" in fresh:
        # Zeros leave the features of images as they were without the table.
        loadable["vision.temporal"] = torch.zeros(config.max_frames, config.width)
        initialised.append("vision.temporal (zeros)")
    modality = loadable.get("modality.weight")
    if modality is not None and modality.ndim == 2 and len(modality) == 2 and config.token_types == 3:
        loadable["modality.weight"] = torch.cat([modality, modality[1:]])
        initialised.append("modality.weight row 2 (copy of row 1)")
    if "rank_head.weight" in fresh and {"itm_head.weight", "itm_head.bias"} <= tensors.keys():
        for kind in ("weight", "bias"):
            loadable[f"rank_head.{kind}"] = tensors[f"itm_head.{kind}"][1:]
        initialised.append("rank_head (row 1 of itm_head)")
    return resized, initialised


def _squeezed(tensor: Tensor, ndim: int) -> Tensor:
    while tensor.ndim > ndim and len(tensor) == 1:
        tensor = tensor[0]
    return tensor


def _strict_message(
    where: str, missing: Collection[str], names: Mapping[str, tuple[str, ...]], report: LoadReport
) -> str:
    lines = []
    if missing:
        keys = [key for name in missing for key in names.get(name, (name,))]
        lines.append(f"{len(keys)} tensors are missing: {listing(keys)}")
    if report.unexpected:
        lines.append(f"{len(report.unexpected)} are not known: {listing(report.unexpected)}")
    return f"{where}: {'; '.join(lines)}; strict=False loads the rest and reports these"
