"""Pre-trained encoders: RoBERTa and CLIP as Hugging Face, OpenAI and timm store them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

from sclkern.errors import UserError
from sclkern.models.config import HEAD_DIM
from sclkern.models.text import LAYER_NORM_EPS as TEXT_EPS
from sclkern.weights.files import WEIGHT_FILES, read_json, read_tensors
from sclkern.weights.names import CLIP_BLOCKS, clip_names, count_blocks, roberta_names
from sclkern.weights.prefixes import without_wrappers

VISION_EPS = nn.LayerNorm(1).eps
ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")
TIMM = "timm:"
# "roberta-base", "organisation/name".
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
REMEDY = "a local directory with config.json and the weights works without a network"

# A tensor that only this kind of vision encoder has.
VISION_MARKS = {
    "openai": "visual.class_embedding",
    "huggingface": "embeddings.class_embedding",
    "timm": "blocks.0.attn.qkv.weight",
}
# Tensors of a source that do not belong to the encoder.
IGNORED = {
    "text": re.compile(r"lm_head\.|(roberta\.)?(pooler\.|embeddings\.position_ids$)"),
    "openai": re.compile(
        r"visual\.proj$|transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text_projection$|logit_scale$"
        r"|(input_resolution|context_length|vocab_size)$"
    ),
    "huggingface": re.compile(
        r"text_model\.|(text|visual)_projection\.|logit_scale$|(vision_model\.)?embeddings\.position_ids$"
    ),
    "timm": re.compile(r"head\."),
}


@dataclass(frozen=True)
class Encoder:
    """A pre-trained encoder.

    Attributes:
        where: the source as the user wrote it.
        tensors: by its names.
        layers: its blocks.
        names: our names -> its names, for all blocks.
        sizes: fields of ``SCLConfig`` that the network must have.
        ignored: its names that do not belong to the encoder.
        defaults: fields of ``SCLConfig`` that it suggests.
    """

    where: str
    tensors: Mapping[str, Tensor]
    layers: int
    names: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, Any]
    ignored: re.Pattern[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read_text_encoder(source: str | Path) -> Encoder:
    """Read RoBERTa.

    Args:
        source: a directory of Hugging Face, or a name on its hub.

    Returns:
        The encoder.

    Raises:
        UserError: not there, not a RoBERTa, or one with other head_dim, activation or epsilon than ours.
    """
    where, path = str(source), local_path(source)
    if not (path / "config.json").is_file():
        raise UserError(f"{where}: no config.json, expected a Hugging Face RoBERTa directory as the text encoder")
    config = _transformers_config(path, where)
    _expect(where, "model_type", config.model_type, ROBERTA_TYPES)
    _expect(where, "hidden_act", config.hidden_act, ("gelu",))
    _expect(where, "layer_norm_eps", config.layer_norm_eps, (TEXT_EPS,))
    _expect(where, "head_dim", config.hidden_size / config.num_attention_heads, (HEAD_DIM,))
    tensors = without_wrappers(read_tensors(path), where)
    mark = "embeddings.word_embeddings.weight"
    prefix = next((p for p in ("roberta.", "") if p + mark in tensors), None)
    if prefix is None:
        raise UserError(f"{where}: no tensor {mark!r}, expected the weights of a RoBERTa as the text encoder")
    return Encoder(
        where,
        tensors,
        config.num_hidden_layers,
        roberta_names(config.num_hidden_layers, prefix),
        sizes={
            "width": config.hidden_size,
            "mlp_ratio": config.intermediate_size // config.hidden_size,
            "vocab_size": config.vocab_size,
            "text_positions": config.max_position_embeddings,
            "text_types": config.type_vocab_size,
            "pad_id": config.pad_token_id,
        },
        defaults={
            "max_text_len": min(50, config.max_position_embeddings - config.pad_token_id - 1),
            **{f"{token}_id": getattr(config, f"{token}_token_id") for token in ("bos", "eos")},
            "mask_id": config.vocab_size - 1,  # of RoBERTa's vocabulary, <mask> is the last
        },
        ignored=IGNORED["text"],
    )


def read_vision_encoder(source: str | Path) -> Encoder:
    """Read a CLIP ViT.

    Args:
        source: a directory of Hugging Face or timm, OpenAI's file, a name on the Hugging Face hub, or "timm:NAME".

    Returns:
        The encoder.

    Raises:
        UserError: not there, not a CLIP ViT, or one with other head_dim, activation or epsilon than ours.
    """
    where = str(source)
    if where.startswith(TIMM):
        model = _timm_model(where.removeprefix(TIMM), where, pretrained=True)
        return _vision_encoder(where, model.state_dict(), "timm", "", _timm_activation(model, where))
    path = local_path(source)
    tensors = without_wrappers(read_tensors(path), where)
    for kind, mark in VISION_MARKS.items():
        prefix = next((key[: -len(mark)] for key in tensors if key.endswith(mark)), None)
        if prefix is None or prefix not in (("", "vision_model.") if kind == "huggingface" else ("",)):
            continue
        if kind == "openai":
            return _vision_encoder(where, tensors, kind, "visual.", "quick_gelu")
        if not (path / "config.json").is_file():
            raise UserError(f"{where}: no config.json to tell the activation, expected the whole directory")
        if kind == "timm":
            stored = read_json(path / "config.json")
            model = _timm_model(str(stored.get("architecture")), where, **stored.get("model_args", {}))
            return _vision_encoder(where, tensors, kind, prefix, _timm_activation(model, where))
        config = _transformers_config(path, where)
        _expect(where, "model_type", config.model_type, ("clip", "clip_vision_model"))
        config = getattr(config, "vision_config", config)
        _expect(where, "hidden_act", config.hidden_act, ("quick_gelu", "gelu"))
        _expect(where, "layer_norm_eps", config.layer_norm_eps, (VISION_EPS,))
        _expect(where, "head_dim", config.hidden_size / config.num_attention_heads, (HEAD_DIM,))
        return _vision_encoder(where, tensors, kind, prefix, config.hidden_act)
    raise UserError(
        f"{where}: none of its {len(tensors)} tensors has a CLIP ViT's name, expected one of Hugging Face, OpenAI or "
        "timm as the vision encoder"
    )


def _vision_encoder(where: str, tensors: Mapping[str, Tensor], kind: str, prefix: str, activation: str) -> Encoder:
    names = clip_names(kind, 1, prefix)

    def shape(name: str, rank: int) -> torch.Size:
        key = names[f"vision.{name}"][0]
        if key not in tensors or tensors[key].ndim < rank:
            raise UserError(f"{where}: no tensor {key!r} of {rank} dimensions, expected one in a CLIP ViT")
        return tensors[key].shape

    layers = count_blocks(tensors, prefix + CLIP_BLOCKS[kind])
    width, _, _, patch = shape("patch_embed.weight", 4)
    grid = round((shape("position", 2)[-2] - 1) ** 0.5)
    return Encoder(
        where,
        tensors,
        layers,
        clip_names(kind, layers, prefix),
        sizes={
            "width": width,
            "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] // width,
            "patch_size": patch,
            "vision_activation": activation,
        },
        defaults={"image_size": grid * patch},
        ignored=IGNORED[kind],
    )


def local_path(source: str | Path) -> Path:
    """Resolve a source to a local path.

    Args:
        source: a file, a directory, or a name on the Hugging Face hub, which is downloaded to its cache first.

    Returns:
        The file or directory.

    Raises:
        UserError: neither a path that exists nor a name that could be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, Path) or not HUB_NAME.fullmatch(source):
        raise UserError(f"{source}: no such file or directory, and not a name on the Hugging Face hub")
    suffixes = (".safetensors", ".bin")
    try:
        for suffix in suffixes:
            names = [name for name in WEIGHT_FILES if suffix in name]
            shards = [name.replace(suffix, f"-*{suffix}") for name in names if name.endswith(suffix)]
            wanted = ["config.json", *names, *shards]
            local = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
            if any((local / name).exists() for name in WEIGHT_FILES):
                break
        return local
    # Offline, proxies, permissions, unknown names: the type of the error depends on the version.
    except Exception as error:
        raise UserError(
            f"{source}: not a local path, and not to be had from the hub ({_brief(error)}); {REMEDY}"
        ) from error


def _timm_model(name: str, where: str, **options: Any) -> Any:
    import timm  # takes seconds, and no other source needs it

    pretrained = options.get("pretrained", False)
    try:
        with torch.device("cpu" if pretrained else "meta"):
            return timm.create_model(name, **options)
    except Exception as error:  # as in local_path, and whatever a model's constructor raises
        remedy = REMEDY if pretrained else "expected an architecture of timm and its arguments"
        raise UserError(f"{where}: timm cannot make {name!r} ({_brief(error)}); {remedy}") from error


def _timm_activation(model: Any, where: str) -> str:
    try:
        block, eps = model.blocks[0], model.norm.eps
        heads, activation = block.attn.num_heads, type(block.mlp.act).__name__
    except (AttributeError, IndexError, TypeError) as error:
        raise UserError(f"{where}: {type(model).__name__} of timm is not a ViT, expected a CLIP ViT") from error
    _expect(where, "LayerNorm eps", eps, (VISION_EPS,))
    _expect(where, "head_dim", model.embed_dim / heads, (HEAD_DIM,))
    _expect(where, "activation", activation, ("QuickGELU", "GELU"))
    return "quick_gelu" if activation == "QuickGELU" else "gelu"


def _transformers_config(path: Path, where: str) -> Any:
    from transformers import AutoConfig  # takes seconds, and our own directories do not need it

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and validation errors of its own
        raise UserError(f"{where}: transformers cannot read its config.json ({_brief(error)})") from error


def _expect(where: str, what: str, got: object, allowed: tuple[object, ...]) -> None:
    if got not in allowed:
        wanted = " or ".join(f"{value}" for value in allowed)
        raise UserError(f"{where}: its {what} is {got}, expected {wanted}; take weights of that architecture")


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
