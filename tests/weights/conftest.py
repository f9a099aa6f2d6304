"""Small encoders of others, with random weights, under the names and in the layouts of the published ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

LAYERS, SIZE = 3, 32
ARCHITECTURES = {"quick_gelu": "vit_base_patch16_clip_quickgelu_224", "gelu": "vit_base_patch16_clip_224"}


def randomise(model: nn.Module) -> nn.Module:
    """Away from initial zeros and ones, which would hide a mix-up of biases and norms."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build_roberta(cls: type, **options) -> nn.Module:
    sizes = {
        "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 1,
        "intermediate_size": 256, "max_position_embeddings": 20, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    return randomise(cls(transformers.RobertaConfig(**(sizes | options))))


def build_clip(cls: type, **options) -> nn.Module:
    sizes = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 1,
        "image_size": SIZE, "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    config = transformers.CLIPVisionConfig(**(sizes | options))
    if cls is transformers.CLIPModel:
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        text |= {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 2}
        config = transformers.CLIPConfig(vision_config=config.to_dict(), text_config=text)
    return randomise(cls(config))


def save_timm_model(path: Path, activation: str = "quick_gelu", **options) -> nn.Module:
    arguments = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": LAYERS, "num_heads": 1} | options
    model = randomise(timm.create_model(ARCHITECTURES[activation], num_classes=7, **arguments))
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    # What timm.models.save_for_hf writes, less what only describes.
    config = {"architecture": ARCHITECTURES[activation], "num_classes": 7, "model_args": arguments}
    (path / "config.json").write_text(json.dumps(config))
    return model


def save_scripted(tensors: dict[str, Tensor], path: Path) -> None:
    """Nested modules with the tensors as buffers, as OpenAI's CLIP file has them."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(last, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(root), path)


@pytest.fixture(scope="session")
def roberta() -> Callable[..., nn.Module]:
    """(class, **config) -> a model with 3 layers of width 64."""
    return build_roberta


@pytest.fixture(scope="session")
def clip() -> Callable[..., nn.Module]:
    """(class, **vision config) -> a model with 3 vision layers of width 64, 17 tokens of 8 pixels a side."""
    return build_clip


@pytest.fixture
def save_timm() -> Callable[..., nn.Module]:
    """(directory, activation, **arguments) -> the saved model, of the same size."""
    return save_timm_model


@pytest.fixture
def save_torchscript() -> Callable[[dict[str, Tensor], Path], None]:
    return save_scripted


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories "text" and "vision", and "wide", a text encoder of twice the width; changed by no test."""
    root = tmp_path_factory.mktemp("sources")
    build_roberta(transformers.RobertaModel).save_pretrained(root / "text")
    build_clip(transformers.CLIPVisionModel).save_pretrained(root / "vision")
    wide = build_roberta(transformers.RobertaModel, hidden_size=128, num_attention_heads=2, intermediate_size=512)
    wide.save_pretrained(root / "wide")
    return root
