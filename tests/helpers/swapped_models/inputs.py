"""Inputs of a tiny model, from the names of its forward's arguments and its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch

ROWS, LENGTH = 3, 8


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of some fields that a configuration, or one within it, sets."""
    inner = [getattr(config, name, None) for name in ("vision_config", "text_config", "audio_config", "encoder")]
    for one in (config, *inner):
        for name in names:
            if one is not None and not isinstance(one, dict) and getattr(one, name, None) is not None:
                return getattr(one, name)
    return default


def text(rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Tokens that end at the right, with an end of text in every row, which CLIP looks for."""
    ids = torch.randint(4, 60, (rows, length))
    ids[:, 4] = 2
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(config: Any) -> torch.Tensor:
    size = find(config, "image_size", "img_size", default=32)
    size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.randn(ROWS, find(config, "num_channels", "in_channels", "in_chans", default=3), *size)


def frames(config: Any) -> torch.Tensor:
    count = find(config, "num_frames", "frames_per_clip", default=2)
    return pixels(config)[:, None].repeat(1, count, 1, 1, 1) + torch.randn(ROWS, count, 1, 1, 1)


def spectrogram(config: Any) -> torch.Tensor:
    bins = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", default=80)
    return torch.randn(ROWS, bins, find(config, "spectrogram_length", default=16))


def boxes() -> torch.Tensor:
    corner = torch.randint(0, 40, (ROWS, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 20, (ROWS, LENGTH, 2))], -1)


def question(config: Any) -> torch.Tensor:
    return torch.randint(4, 60, (ROWS, 4))


MAKERS = {
    "pixel_values": pixels,
    "pixel_values_videos": frames,
    "input_values": lambda config: torch.randn(ROWS, 1600),
    "input_features": spectrogram,
    "bbox": lambda config: boxes(),
    "decoder_input_ids": lambda config: torch.randint(4, 60, (ROWS, 6)),
}


def make_inputs(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What the model's forward takes: right-padded text, images, sound.

    Args:
        model: a tiny model.
        given: arguments by name: a value, a function of the configuration, or None to leave the argument out.

    Returns:
        Keyword arguments.
    """
    torch.manual_seed(0)
    names = inspect.signature(type(model).forward).parameters
    inputs: dict[str, Any] = {}
    if "input_ids" in names:
        inputs |= {name: value for name, value in text().items() if name in names}
    for name, make in MAKERS.items():
        if name in names and name not in given and not (name == "pixel_values_videos" and "pixel_values" in names):
            inputs[name] = make(model.config)
    if "image_grid_thw" in names and "pixel_values" in inputs and "image_grid_thw" not in given:
        inputs |= patches(model.config)
    if "return_loss" in names:
        inputs["return_loss"] = True
    for name, value in given.items():
        inputs[name] = value(model.config) if callable(value) else value
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if "input_ids" in inputs and "pixel_values" in inputs and hasattr(model, "get_image_features"):
        add_image_tokens(model, inputs)
    return inputs


def patches(config: Any) -> dict[str, torch.Tensor]:
    """Images of 4 by 4 patches, one patch a row, as Qwen's models take them."""
    size, time = find(config, "patch_size"), find(config, "temporal_patch_size", default=1)
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    return {"pixel_values": torch.randn(ROWS * 16, channels * time * size**2), "image_grid_thw": grid}


def add_image_tokens(model: Any, inputs: dict[str, Any]) -> None:
    """Put as many image tokens before the text as the model makes features of an image, where it has such a token."""
    token = find(model.config, "image_token_id", "image_token_index")
    if token is None:
        return
    names = inspect.signature(model.get_image_features).parameters
    with torch.no_grad():
        features = model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    if hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    features = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features
    count = features.shape[:-1].numel() // ROWS
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    inputs["input_ids"] = torch.cat([ids.new_full((ROWS, count), token), ids], 1)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([mask.new_ones(ROWS, count), mask], 1)
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).long()
