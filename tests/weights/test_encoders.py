"""RoBERTa and CLIP of others, from every kind of file: their numbers from our encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sclkern.model import SCLModel

LAYERS, SIZE = 3, 32


def openai_tensors(vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face CLIP vision state under OpenAI's names, with the rest of an OpenAI file."""
    out = {
        "visual.proj": torch.ones(64, 8), "text_projection": torch.ones(8, 8), "logit_scale": torch.ones([]),
        "token_embedding.weight": torch.ones(9, 8), "positional_embedding": torch.ones(4, 8),
        "transformer.resblocks.0.ln_1.weight": torch.ones(8), "ln_final.weight": torch.ones(8),
        "input_resolution": torch.tensor(SIZE), "context_length": torch.tensor(4), "vocab_size": torch.tensor(9),
    }  # fmt: skip
    renamed = {
        "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        renamed |= {f"pre_layrnorm.{kind}": f"ln_pre.{kind}", f"post_layernorm.{kind}": f"ln_post.{kind}"}
        for i in range(LAYERS):
            theirs, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            renamed |= {
                f"{theirs}layer_norm1.{kind}": f"{block}ln_1.{kind}",
                f"{theirs}layer_norm2.{kind}": f"{block}ln_2.{kind}",
                f"{theirs}self_attn.out_proj.{kind}": f"{block}attn.out_proj.{kind}",
                f"{theirs}mlp.fc1.{kind}": f"{block}mlp.c_fc.{kind}",
                f"{theirs}mlp.fc2.{kind}": f"{block}mlp.c_proj.{kind}",
            }
            stacked = torch.cat([vision[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            out[f"visual.{block}attn.in_proj_{kind}"] = stacked
    return out | {"visual." + ours: vision[theirs] for theirs, ours in renamed.items()}


def vision_state(model: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("vision_model."): tensor for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("cls", [transformers.RobertaModel, transformers.RobertaForMaskedLM])
@pytest.mark.parametrize("binary", [False, True])
def test_roberta(tmp_path: Path, sources: Path, cls: type, binary: bool, roberta) -> None:
    theirs = roberta(cls)
    theirs.save_pretrained(tmp_path)
    if binary:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model = SCLModel.from_pretrained((tmp_path, sources / "vision")).eval()
    ids = torch.randint(3, 98, (4, 12))
    lengths = torch.tensor([12, 3, 7, 1])
    mask = torch.arange(12) < lengths[:, None]
    ids = torch.where(mask, ids, 1)
    with torch.no_grad():
        base = getattr(theirs, "roberta", theirs)
        expected = base(ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(model.text(ids, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)
    ignored = [key for key in model.load_report.ignored if key.startswith(("lm_head.", "roberta.", "pooler."))]
    assert len(ignored) == (2 if cls is transformers.RobertaModel else 5)
    assert model.config.max_text_len == 18 and model.config.mask_id == 98
    assert (model.config.bos_id, model.config.pad_id, model.config.eos_id) == (0, 1, 2)


def check_vision(model: SCLModel, theirs: nn.Module, blocks: int) -> None:
    images = torch.randn(2, 3, SIZE, SIZE)
    vision = getattr(theirs, "vision_model", theirs)
    with torch.no_grad():
        states = vision(images, output_hidden_states=True).hidden_states
        assert len(states) == LAYERS + 1
        expected = vision.post_layernorm(states[blocks])
        torch.testing.assert_close(model.vision(images).tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("blocks", [None, LAYERS])
def test_hugging_face_clip(tmp_path: Path, sources: Path, cls: str, activation: str, blocks: int | None, clip) -> None:
    theirs = clip(getattr(transformers, cls), hidden_act=activation)
    theirs.save_pretrained(tmp_path)
    model = SCLModel.from_pretrained((sources / "text", tmp_path), vision_layers=blocks)
    assert model.config.vision_activation == activation and model.config.image_size == SIZE
    check_vision(model, theirs, blocks or LAYERS - 1)
    report = model.load_report
    assert report.dropped == (() if blocks else (f"vision block {LAYERS} of {LAYERS}",))
    dropped = [key for key in report.ignored if f"encoder.layers.{LAYERS - 1}." in key and "text_model" not in key]
    assert len(dropped) == (0 if blocks else 16)
    assert not report.missing and not report.unexpected


def test_older_hugging_face_names(tmp_path: Path, sources: Path, clip) -> None:
    theirs = clip(transformers.CLIPVisionModel)
    theirs.save_pretrained(tmp_path)
    older = {"vision_model." + key: tensor for key, tensor in vision_state(theirs).items()}
    older["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(older, tmp_path / "model.safetensors")
    check_vision(SCLModel.from_pretrained((sources / "text", tmp_path)), theirs, LAYERS - 1)


@pytest.mark.parametrize("scripted", [True, False])
def test_openai_clip(tmp_path: Path, sources: Path, scripted: bool, clip, save_torchscript) -> None:
    theirs = clip(transformers.CLIPVisionModel)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.half())
    tensors = openai_tensors({key: tensor.half() for key, tensor in vision_state(theirs).items()})
    (save_torchscript if scripted else torch.save)(tensors, tmp_path / "ViT.pt")
    model = SCLModel.from_pretrained((sources / "text", tmp_path / "ViT.pt"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    check_vision(model, theirs, LAYERS - 1)
    assert {"visual.proj", "logit_scale", "ln_final.weight", "input_resolution"} <= set(model.load_report.ignored)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("source", ["directory", "name"])
def test_timm(
    tmp_path: Path, sources: Path, activation: str, source: str, monkeypatch: pytest.MonkeyPatch, save_timm
) -> None:
    theirs = save_timm(tmp_path / "timm", activation)
    if source == "name":
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: theirs)
    where = tmp_path / "timm" if source == "directory" else "timm:some_vit"
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        model = SCLModel.from_pretrained((sources / "text", where), vision_layers=LAYERS)
        expected = theirs.forward_features(images)
        torch.testing.assert_close(model.vision(images).tokens, expected, atol=1e-5, rtol=1e-5)
        assert set(model.load_report.ignored) >= {"head.weight", "head.bias"}
        model = SCLModel.from_pretrained((sources / "text", where))
        del theirs.blocks[-1]
        expected = theirs.forward_features(images)
        torch.testing.assert_close(model.vision(images).tokens, expected, atol=1e-5, rtol=1e-5)
