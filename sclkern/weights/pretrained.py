"""Our own directories, and networks built on a pre-trained text encoder (RoBERTa) and vision encoder (CLIP)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from sclkern.errors import UserError
from sclkern.io import write_atomically
from sclkern.models import SCLConfig
from sclkern.models.config import MODEL_TYPE
from sclkern.weights.encoders import Encoder, local_path, read_text_encoder, read_vision_encoder
from sclkern.weights.files import read_json, read_tensors
from sclkern.weights.loading import LoadReport, NetworkT, changed, fill, on_cpu, part_changes, part_of
from sclkern.weights.names import gather
from sclkern.weights.prefixes import OURS, without_prefix
from sclkern.weights.saving import saved_weights, unwrapped

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(network: nn.Module, path: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a directory, each whole or not at all.

    Args:
        network: an ``SCLNetwork`` or ``SCLModel``, also in torch.compile, DistributedDataParallel or DataParallel. Tied
            weights are written once for each of their names.
        path: the directory; created if it does not exist.

    Raises:
        UserError: no such network, weights that could not be loaded again (see ``saving.saved_weights``), or the
            operating system refused.
    """
    path = Path(path).expanduser()
    tensors = saved_weights(network)

    def write(file: Path) -> None:
        file.touch()
        mode = file.stat().st_mode
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors lets nobody but the owner read its files

    write_atomically(path / WEIGHTS, write)
    write_atomically(path / CONFIG, unwrapped(network).config.save)


def from_pretrained(
    build: Callable[[SCLConfig], NetworkT],
    source: str | Path | tuple[str | Path, str | Path],
    *,
    strict: bool = True,
    config: SCLConfig | None = None,
    **changes: Any,
) -> tuple[NetworkT, LoadReport]:
    """Build a network from a directory of ``save_pretrained``, or on a pair of pre-trained encoders.

    A directory gives the network that was saved. ``config`` or ``changes`` may ask for another image size, frames or
    heads, with the rules of ``from_reference``.

    A pair (text, vision) gives those encoders; all else is new. Sizes that the encoders have are theirs, also the image
    size; the rest is as in ``SCLConfig()``, ``config`` or ``changes``. All vision blocks but the last are kept, as in
    the published code, unless ``vision_layers`` says otherwise.

    Args:
        build: makes the network of a config: ``SCLNetwork``, or what the classmethods of ``SCLModel`` pass.
        source: the directory, or the pair. The text encoder is a directory of Hugging Face's RoBERTa; the vision
            encoder a directory of Hugging Face's CLIP or of a timm CLIP ViT, or OpenAI's CLIP file (the tensors show
            which). Either may be a name on the Hugging Face hub instead, the vision encoder also "timm:NAME".
        strict: whether a missing or unexpected tensor is an error; otherwise it is in the report.
        config: the sizes; None takes those of the source.
        **changes: fields of ``SCLConfig``; None changes nothing.

    Returns:
        The network, in float32 on the CPU, in training mode, and the report.

    Raises:
        UserError: a source cannot be read or downloaded, has an architecture that ``SCLNetwork`` cannot run or that is
            not the config's, or, with ``strict``, lacks tensors or has unexpected ones.
    """
    if isinstance(source, tuple | list):
        if len(source) != 2:
            raise UserError(f"source: got {len(source)} sources, expected a directory or a pair (text, vision)")
        text, vision = read_text_encoder(source[0]), read_vision_encoder(source[1])
        return _from_encoders(build, text, vision, strict, config, changes)
    return _from_directory(build, local_path(source), strict, config, changes)


def _from_directory(
    build: Callable[[SCLConfig], NetworkT],
    path: Path,
    strict: bool,
    config: SCLConfig | None,
    changes: Mapping[str, Any],
) -> tuple[NetworkT, LoadReport]:
    if path.is_file():
        raise UserError(
            f"{path}: is a file, expected a directory of save_pretrained (from_reference takes a published checkpoint)"
        )
    stored = stored_config(path / CONFIG)
    target = changed(config or stored, changes)
    tensors, where = without_prefix(read_tensors(path), OURS, str(path))
    network = on_cpu(build, target)
    fresh_parts, dropped_parts = part_changes(stored, target)
    parameters = network.state_dict().keys()
    surplus = sorted(tensors.keys() - parameters)
    report = fill(
        network,
        tensors,
        names={},
        fresh={name for name in parameters if part_of(name) in fresh_parts},
        report=LoadReport(
            0,
            unexpected=tuple(name for name in surplus if part_of(name) not in dropped_parts),
            ignored=tuple(name for name in surplus if part_of(name) in dropped_parts),
            dropped=tuple(sorted(dropped_parts)),
        ),
        where=where,
        strict=strict,
    )
    return network, report


def stored_config(file: Path) -> SCLConfig:
    """The configuration that ``save_pretrained`` wrote, of this library or of its model for transformers.

    Args:
        file: ``config.json``.

    Returns:
        The sizes.

    Raises:
        UserError: the file cannot be read, or describes another model.
    """
    values = read_json(file)
    kind = values.pop("model_type", None) or values.get("architecture")
    if kind not in (None, MODEL_TYPE):
        raise UserError(
            f"{file}: describes {kind!r}, expected a directory of "
            "save_pretrained; RoBERTa and CLIP weights go in as a pair (text, vision)"
        )
    if "transformers_version" in values:
        # Beside the sizes stands what transformers writes of every model.
        sizes = {field.name for field in dataclasses.fields(SCLConfig)}
        values = {name: value for name, value in values.items() if name in sizes}
    try:
        return SCLConfig.from_dict(values)
    except (UserError, TypeError) as error:
        raise UserError(f"{file}: {error}") from error


def _from_encoders(
    build: Callable[[SCLConfig], NetworkT],
    text: Encoder,
    vision: Encoder,
    strict: bool,
    config: SCLConfig | None,
    changes: Mapping[str, Any],
) -> tuple[NetworkT, LoadReport]:
    for key in ("width", "mlp_ratio"):
        if text.sizes[key] != vision.sizes[key]:
            raise UserError(
                f"{key}: {text.where} has {text.sizes[key]}, {vision.where} has {vision.sizes[key]}; "
                "expected the same, take encoders of one size"
            )
    sizes = {**vision.sizes, **text.sizes}
    if config is None:
        # As in the published code: one block fewer than CLIP has.
        layers = {"text_layers": text.layers, "vision_layers": max(vision.layers - 1, 0)}
        config = SCLConfig.from_dict({**vision.defaults, **text.defaults, **sizes, **layers})
    config = changed(config, changes)
    for encoder, stream in ((text, "text"), (vision, "vision")):
        for key, value in encoder.sizes.items():
            if getattr(config, key) != value:
                raise UserError(
                    f"{encoder.where}: its {key} is {value!r}, but the config says {getattr(config, key)!r}"
                )
        if getattr(config, f"{stream}_layers") > encoder.layers:
            raise UserError(
                f"{stream}_layers: got {getattr(config, f'{stream}_layers')}, expected at most {encoder.layers}, "
                f"the blocks of {encoder.where}"
            )

    network = on_cpu(build, config)
    parameters = network.state_dict().keys()
    tensors: dict[str, Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    unexpected, ignored, dropped = [], [], []
    for encoder, stream, keep in (
        (text, "text", config.text_layers),
        (vision, "vision", config.vision_layers),
    ):
        gathered = gather(encoder.names, encoder.tensors, encoder.where)
        tensors |= gathered.tensors
        names |= gathered.names
        unexpected += [key for key in gathered.unused if not encoder.ignored.match(key)]
        ignored += [key for key in gathered.unused if encoder.ignored.match(key)]
        ignored += [key for name in gathered.tensors if name not in parameters for key in gathered.names[name]]
        dropped += [f"{stream} block {i + 1} of {encoder.layers}" for i in range(keep, encoder.layers)]
    report = fill(
        network,
        tensors,
        names=names,
        fresh={name for name in parameters if part_of(name) is not None or not name.startswith(("text.", "vision."))},
        report=LoadReport(0, unexpected=tuple(unexpected), ignored=tuple(ignored), dropped=tuple(dropped)),
        where=f"({text.where}, {vision.where})",
        strict=strict,
    )
    return network, report
