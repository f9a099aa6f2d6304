"""Our parameter names beside those of published checkpoints: SCL and METER, RoBERTa, and CLIP in its three forms.

Our query, key and value projections are stacked in one matrix; a BERT checkpoint has three, CLIP has one or three.
Published names are those that the writing code uses: SCL's and METER's modules, transformers, timm, OpenAI's CLIP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sclkern.errors import UserError
from sclkern.models.config import HEAD_DIM, SCLConfig

# Tensors of a published checkpoint that no model uses: RoBERTa's pooler and position_ids, SCL's unused MAE decoder,
# the parts of CLIP's text tower that METER keeps.
DEAD = re.compile(
    r"text_transformer\.(pooler\.|embeddings\.position_ids$)"
    r"|vision_transformer\.(decoder_(embed|pos_embed|blocks|norm|pred)\b|mask_token$"
    r"|token_embedding\.|positional_embedding$|ln_final\.)"
)

# Our module -> the published one, for each head.
HEAD_MODULES = {
    "itm": {"itm_head": "itm_score.fc"},
    "mlm": {"mlm_head.dense": "mlm_score.transform.dense", "mlm_head.norm": "mlm_score.transform.LayerNorm"},
    "itc": {
        f"{ours}_projection.{i}": f"{theirs}_proj.{i}"
        for ours, theirs in (("text", "language"), ("image", "vision"))
        for i in (0, 1, 3)
    },
    "vqa": {f"vqa_head.{i}": f"vqa_classifier.{i}" for i in (0, 1, 3)},
    "nlvr2": {f"nlvr2_head.{i}": f"nlvr2_classifier.{i}" for i in (0, 1, 3)},
    "rank": {"rank_head": "rank_output"},
}

# Heads' tensors that are not the weight and bias of one module.
HEAD_TENSORS = {
    "mlm": {"mlm_head.decoder.weight": "mlm_score.decoder.weight", "mlm_head.decoder.bias": "mlm_score.bias"},
    "itc": {"temperature": "cl_temp"},
}

# The published tensors have a leading dimension of 1.
PUBLISHED_1 = ("vision.mask_token", "vision.temporal")

# The vision encoder: our name -> theirs, by the code that wrote the file. {i}: block; {k}: weight or bias.
CLIP_NAMES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "openai": {
        "patch_embed.weight": "conv1.weight",
        "cls": "class_embedding",
        "position": "positional_embedding",
        "norm_pre.{k}": "ln_pre.{k}",
        "norm_post.{k}": "ln_post.{k}",
        "blocks.{i}.attention_norm.{k}": "transformer.resblocks.{i}.ln_1.{k}",
        "blocks.{i}.attention.in_proj.{k}": "transformer.resblocks.{i}.attn.in_proj_{k}",
        "blocks.{i}.attention.out_proj.{k}": "transformer.resblocks.{i}.attn.out_proj.{k}",
        "blocks.{i}.mlp_norm.{k}": "transformer.resblocks.{i}.ln_2.{k}",
        "blocks.{i}.mlp.fc1.{k}": "transformer.resblocks.{i}.mlp.c_fc.{k}",
        "blocks.{i}.mlp.fc2.{k}": "transformer.resblocks.{i}.mlp.c_proj.{k}",
    },
    "huggingface": {
        "patch_embed.weight": "embeddings.patch_embedding.weight",
        "cls": "embeddings.class_embedding",
        "position": "embeddings.position_embedding.weight",
        "norm_pre.{k}": "pre_layrnorm.{k}",  # sic
        "norm_post.{k}": "post_layernorm.{k}",
        "blocks.{i}.attention_norm.{k}": "encoder.layers.{i}.layer_norm1.{k}",
        "blocks.{i}.attention.in_proj.{k}": tuple(f"encoder.layers.{{i}}.self_attn.{x}_proj.{{k}}" for x in "qkv"),
        "blocks.{i}.attention.out_proj.{k}": "encoder.layers.{i}.self_attn.out_proj.{k}",
        "blocks.{i}.mlp_norm.{k}": "encoder.layers.{i}.layer_norm2.{k}",
        "blocks.{i}.mlp.fc1.{k}": "encoder.layers.{i}.mlp.fc1.{k}",
        "blocks.{i}.mlp.fc2.{k}": "encoder.layers.{i}.mlp.fc2.{k}",
    },
    "timm": {
        "patch_embed.weight": "patch_embed.proj.weight",
        "cls": "cls_token",
        "position": "pos_embed",
        "norm_pre.{k}": "norm_pre.{k}",
        "norm_post.{k}": "norm.{k}",
        "blocks.{i}.attention_norm.{k}": "blocks.{i}.norm1.{k}",
        "blocks.{i}.attention.in_proj.{k}": "blocks.{i}.attn.qkv.{k}",
        "blocks.{i}.attention.out_proj.{k}": "blocks.{i}.attn.proj.{k}",
        "blocks.{i}.mlp_norm.{k}": "blocks.{i}.norm2.{k}",
        "blocks.{i}.mlp.fc1.{k}": "blocks.{i}.mlp.fc1.{k}",
        "blocks.{i}.mlp.fc2.{k}": "blocks.{i}.mlp.fc2.{k}",
    },
}
CLIP_BLOCKS = {"openai": "transformer.resblocks.", "huggingface": "encoder.layers.", "timm": "blocks."}


def bert_block(ours: str, theirs: str, *, cross: bool = False) -> dict[str, tuple[str, ...]]:
    """Names of one BERT layer.

    Args:
        ours: prefix of our names, without its dot.
        theirs: prefix of their names, without its dot.
        cross: whether the layer has cross-attention.

    Returns:
        Our name -> their names, which are stacked along rows.
    """
    names: dict[str, tuple[str, ...]] = {}
    modules = {"attention": "attention"} | ({"cross_attention": "crossattention"} if cross else {})
    for kind in ("weight", "bias"):
        for mine, its in modules.items():
            stacked = tuple(f"{theirs}.{its}.self.{part}.{kind}" for part in ("query", "key", "value"))
            names[f"{ours}.{mine}.in_proj.{kind}"] = stacked
            names[f"{ours}.{mine}.out_proj.{kind}"] = (f"{theirs}.{its}.output.dense.{kind}",)
            names[f"{ours}.{mine}_norm.{kind}"] = (f"{theirs}.{its}.output.LayerNorm.{kind}",)
        names[f"{ours}.mlp.fc1.{kind}"] = (f"{theirs}.intermediate.dense.{kind}",)
        names[f"{ours}.mlp.fc2.{kind}"] = (f"{theirs}.output.dense.{kind}",)
        names[f"{ours}.mlp_norm.{kind}"] = (f"{theirs}.output.LayerNorm.{kind}",)
    return names


def roberta_names(layers: int, theirs: str) -> dict[str, tuple[str, ...]]:
    """Names of the text encoder.

    Args:
        layers: its blocks.
        theirs: prefix of their names, with its dot: "roberta.", "text_transformer." or "".

    Returns:
        Our name -> their names, which are stacked along rows.
    """
    names: dict[str, tuple[str, ...]] = {
        "text.word.weight": (f"{theirs}embeddings.word_embeddings.weight",),
        "text.position.weight": (f"{theirs}embeddings.position_embeddings.weight",),
        "text.token_type.weight": (f"{theirs}embeddings.token_type_embeddings.weight",),
        "text.norm.weight": (f"{theirs}embeddings.LayerNorm.weight",),
        "text.norm.bias": (f"{theirs}embeddings.LayerNorm.bias",),
    }
    for i in range(layers):
        names |= bert_block(f"text.blocks.{i}", f"{theirs}encoder.layer.{i}")
    return names


def clip_names(kind: str, layers: int, theirs: str) -> dict[str, tuple[str, ...]]:
    """Names of the vision encoder.

    Args:
        kind: a key of ``CLIP_NAMES``.
        layers: its blocks.
        theirs: prefix of their names, with its dot.

    Returns:
        Our name -> their names, which are stacked along rows.
    """
    names: dict[str, tuple[str, ...]] = {}
    for ours, published in CLIP_NAMES[kind].items():
        sources = (published,) if isinstance(published, str) else published
        for i in range(layers) if "{i}" in ours else (0,):
            for k in ("weight", "bias") if "{k}" in ours else ("",):
                names["vision." + ours.format(i=i, k=k)] = tuple(theirs + name.format(i=i, k=k) for name in sources)
    return names


def reference_names(config: SCLConfig) -> dict[str, tuple[str, ...]]:
    """Every parameter of ``SCLNetwork(config)`` -> its names in a published checkpoint."""
    names = roberta_names(config.text_layers, "text_transformer.")
    names |= clip_names("openai", config.vision_layers, "vision_transformer.visual.")
    if config.max_frames:
        names["vision.temporal"] = ("vision_transformer.visual.temporal_embed",)
    if config.patch_mask_token:
        names["vision.mask_token"] = ("vision_transformer.visual.visual_mask_token",)
    names["modality.weight"] = ("token_type_embeddings.weight",)
    modules = {
        "text_transform": "cross_modal_text_transform",
        "image_transform": "cross_modal_image_transform",
        "text_pooler.dense": "cross_modal_text_pooler.dense",
        "image_pooler.dense": "cross_modal_image_pooler.dense",
    }
    for i in range(config.fusion_layers):
        for stream in ("text", "image"):
            names |= bert_block(f"fusion.{stream}_layers.{i}", f"cross_modal_{stream}_layers.{i}", cross=True)
    for head in config.heads:
        modules |= HEAD_MODULES[head]
        names |= {ours: (theirs,) for ours, theirs in HEAD_TENSORS.get(head, {}).items()}
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = (f"{theirs}.{kind}",)
    return names


def split_to_reference(config: SCLConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split tensors under our names into those of the published names and shapes.

    Args:
        config: of the network.
        tensors: weights or gradients by our names. Names that ``SCLNetwork(config)`` does not have are left out.

    Returns:
        Views of the tensors, by published name.
    """
    out: dict[str, Tensor] = {}
    for ours, theirs in reference_names(config).items():
        if ours in tensors:
            tensor = tensors[ours][None] if ours in PUBLISHED_1 else tensors[ours]
            out.update(zip(theirs, tensor.chunk(len(theirs)) if len(theirs) > 1 else (tensor,), strict=True))
    return out


class Gathered(NamedTuple):
    """Tensors of a checkpoint under our names.

    Attributes:
        tensors: by our names; those of which the checkpoint has every piece.
        names: our names -> the checkpoint's: all of them if it has every piece, otherwise those that are absent.
        unused: the checkpoint's names that belong to none of ours.
    """

    tensors: dict[str, Tensor]
    names: dict[str, tuple[str, ...]]
    unused: list[str]


def gather(names: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor], where: str) -> Gathered:
    """Rename tensors of a checkpoint, and stack those that are one tensor of ours.

    Args:
        names: our names -> the checkpoint's.
        tensors: the checkpoint.
        where: its source, for messages.

    Returns:
        The tensors under our names.

    Raises:
        UserError: tensors that belong in one stack differ in shape.
    """
    stacked: dict[str, Tensor] = {}
    messages: dict[str, tuple[str, ...]] = {}
    for ours, theirs in names.items():
        absent = tuple(name for name in theirs if name not in tensors)
        messages[ours] = absent or theirs
        if absent:
            continue
        pieces = [tensors[name] for name in theirs]
        for name, piece in zip(theirs, pieces, strict=True):
            if piece.shape != pieces[0].shape:
                raise UserError(
                    f"{where}: {name} has shape {tuple(piece.shape)}, expected that of {theirs[0]}, "
                    f"{tuple(pieces[0].shape)}; the file is damaged or of another architecture"
                )
        stacked[ours] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    used = {name for theirs in names.values() for name in theirs}
    return Gathered(stacked, messages, sorted(set(tensors) - used))


def optional_parts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields ``heads``, ``max_frames`` and ``patch_mask_token`` of a published checkpoint."""
    keys = {
        head: {f"{name}.{kind}" for name in modules.values() for kind in ("weight", "bias")}
        | set(HEAD_TENSORS.get(head, {}).values())
        for head, modules in HEAD_MODULES.items()
    }
    temporal = tensors.get("vision_transformer.visual.temporal_embed")
    return {
        "heads": tuple(head for head, names in keys.items() if names & tensors.keys()),
        "max_frames": 0 if temporal is None else temporal.shape[-2] if temporal.ndim > 1 else 1,
        "patch_mask_token": "vision_transformer.visual.visual_mask_token" in tensors,
    }


def infer_config(tensors: Mapping[str, Tensor], where: str = "checkpoint") -> SCLConfig:
    """Infer the sizes of a published checkpoint from its tensors.

    The rest is as in the published code: QuickGELU, RoBERTa's special tokens, ``<mask>`` the last token.

    Args:
        tensors: the checkpoint.
        where: its source, for messages.

    Returns:
        The config.

    Raises:
        UserError: a tensor that shows a size is absent or of another rank, so this is not a checkpoint of SCL or METER.
    """

    def shape(name: str, rank: int) -> torch.Size:
        if name not in tensors:
            remedy = "from_pretrained takes RoBERTa and CLIP weights"
            if "text.word.weight" in tensors:
                remedy = "these are SCLModel's own: load_state_dict of an SCLModel of their config takes them"
            raise UserError(
                f"{where}: no tensor {name!r} among its {len(tensors)}, expected the names of a published SCL or METER "
                f"checkpoint ({remedy})"
            )
        if tensors[name].ndim < rank or not tensors[name].numel():
            raise UserError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, expected {rank} dimensions")
        return tensors[name].shape

    visual = "vision_transformer.visual."
    vocab, width = shape("text_transformer.embeddings.word_embeddings.weight", 2)[-2:]
    patch = shape(visual + "conv1.weight", 4)[-1]
    patches = shape(visual + "positional_embedding", 2)[-2] - 1
    positions = shape("text_transformer.embeddings.position_embeddings.weight", 2)[0]
    if width % HEAD_DIM:
        raise UserError(f"{where}: width {width}, expected a multiple of {HEAD_DIM} (head_dim)")
    grid = math.isqrt(patches)
    if grid**2 != patches or not grid:
        raise UserError(f"{where}: {visual}positional_embedding has {patches} patches, expected a square grid")
    blocks = (
        "cross_modal_text_layers.0.intermediate.dense.weight",
        "text_transformer.encoder.layer.0.intermediate.dense.weight",
        visual + "transformer.resblocks.0.mlp.c_fc.weight",
    )
    hidden = next((shape(name, 2)[0] for name in blocks if name in tensors), 4 * width)
    sizes: dict[str, Any] = {
        "width": width,
        "vision_layers": count_blocks(tensors, visual + "transformer.resblocks."),
        "text_layers": count_blocks(tensors, "text_transformer.encoder.layer."),
        "fusion_layers": count_blocks(tensors, "cross_modal_text_layers."),
        "image_size": grid * patch,
        "patch_size": patch,
        "vocab_size": vocab,
        "max_text_len": min(50, positions - 2),
        "text_positions": positions,
        "text_types": shape("text_transformer.embeddings.token_type_embeddings.weight", 2)[0],
        "token_types": shape("token_type_embeddings.weight", 2)[0],
        "mlp_ratio": hidden // width,
        "mask_id": vocab - 1,
        **optional_parts(tensors),
    }
    if "itc" in sizes["heads"]:
        sizes["projection_dim"] = shape("vision_proj.3.weight", 2)[0]
    if "vqa" in sizes["heads"]:
        sizes["vqa_answers"] = shape("vqa_classifier.3.weight", 2)[0]
    return SCLConfig.from_dict(sizes)


def count_blocks(tensors: Iterable[str], prefix: str) -> int:
    """One more than the highest block number behind ``prefix``, though never more than there are tensors."""
    numbers = [key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)]
    highest = max((int(number) for number in numbers if number.isdecimal()), default=-1)
    return min(1 + highest, len(numbers))
