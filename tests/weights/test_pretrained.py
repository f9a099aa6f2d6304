"""Our own directories, and models on a pair of encoders of others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.models import SCLConfig
from sclkern.weights import save_pretrained
from sclkern.weights.loading import resize_positions

LAYERS = 3
from_pretrained = SCLModel.from_pretrained


@pytest.fixture
def tiny() -> SCLModel:
    return SCLModel(SCLConfig.preset("tiny"))


# -- a pair ------------------------------------------------------------------------------------------------------------


def test_a_pair_gives_a_model_that_trains(sources: Path) -> None:
    pair = (str(sources / "text"), str(sources / "vision"))
    changes = {"fusion_layers": 1, "heads": ("itm", "mlm", "itc"), "image_size": 64, "max_frames": 4, "dropout": 0.0}
    model = SCLModel.from_pretrained(pair, **changes)
    config = model.config
    assert (config.width, config.vocab_size, config.text_layers, config.vision_layers) == (64, 99, LAYERS, LAYERS - 1)
    assert config.max_text_len == 18 and config.text_positions == 20 and config.image_size == 64
    table = load_file(sources / "vision" / "model.safetensors")["embeddings.position_embedding.weight"]
    assert torch.equal(model.vision.position, resize_positions(table, 8))
    assert model.vision.temporal.count_nonzero() == 0
    report = model.load_report
    assert report.resized == ("vision.position 17 -> 65",)
    assert report.initialised == (
        "vision.temporal (zeros)", "fusion", "image_pooler", "image_projection", "image_transform", "itm_head",
        "mlm_head", "modality", "temperature", "text_pooler", "text_projection", "text_transform", "vision.mask_token",
    )  # fmt: skip
    assert report.loaded == sum(name.startswith(("text.", "vision.")) for name in model.state_dict()) - 2
    with torch.no_grad():
        text = model.encode_text(torch.tensor([[0, 5, 2]]), torch.ones(1, 3, dtype=torch.bool))
        image = model.encode_image(torch.randn(1, 4, 3, 64, 64))
        assert model.pool(*model.run_fusion(text, torch.ones(1, 3), image).cls).isfinite().all()


def test_a_pair_with_a_config(sources: Path) -> None:
    pair = (sources / "text", sources / "vision")
    config = from_pretrained(pair, fusion_layers=1).config
    given = from_pretrained(pair, config=config.replace(text_layers=1, heads=("vqa",)))
    assert given.load_report.dropped == (
        f"text block 2 of {LAYERS}", f"text block 3 of {LAYERS}", f"vision block {LAYERS} of {LAYERS}",
    )  # fmt: skip
    with pytest.raises(UserError, match="text: its vocab_size is 99, but the config says 98"):
        from_pretrained(pair, config=config, vocab_size=98, mask_id=97)
    with pytest.raises(UserError, match="vision: its vision_activation is 'quick_gelu', but the config says 'gelu'"):
        from_pretrained(pair, config=config.replace(vision_activation="gelu"))
    with pytest.raises(UserError, match=f"vision_layers: got {LAYERS + 1}, expected at most {LAYERS}"):
        from_pretrained(pair, vision_layers=LAYERS + 1)
    with pytest.raises(UserError, match="fusion_layer: unknown key, did you mean 'fusion_layers'"):
        from_pretrained(pair, fusion_layer=2)


def test_widths_must_agree(sources: Path) -> None:
    with pytest.raises(UserError, match=r"width: .*wide has 128, .*vision has 64; expected the same"):
        from_pretrained((sources / "wide", sources / "vision"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_norm_eps": 1e-12}, "its layer_norm_eps is 1e-12, expected 1e-05"),
        ({"hidden_act": "relu"}, "its hidden_act is relu, expected gelu"),
        ({"num_attention_heads": 2}, "its head_dim is 32.0, expected 64"),
    ],
)
def test_other_text_encoders(tmp_path: Path, sources: Path, options: dict, message: str, roberta) -> None:
    roberta(transformers.RobertaModel, **options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        from_pretrained((tmp_path, sources / "vision"))


def test_other_encoders(tmp_path: Path, sources: Path, clip, save_timm) -> None:
    with pytest.raises(UserError, match="its model_type is clip_vision_model, expected roberta or"):
        from_pretrained((sources / "vision", sources / "vision"))
    with pytest.raises(UserError, match=r"text: none of its .* tensors has a CLIP ViT's name"):
        from_pretrained((sources / "text", sources / "text"))
    clip(transformers.CLIPVisionModel, hidden_act="relu").save_pretrained(tmp_path / "relu")
    with pytest.raises(UserError, match="its hidden_act is relu, expected quick_gelu or gelu"):
        from_pretrained((sources / "text", tmp_path / "relu"))
    save_timm(tmp_path / "timm", num_heads=2)
    with pytest.raises(UserError, match=r"its head_dim is 32.0, expected 64"):
        from_pretrained((sources / "text", tmp_path / "timm"))
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "vit_of_nobody"}')
    with pytest.raises(UserError, match="timm cannot make 'vit_of_nobody'"):
        from_pretrained((sources / "text", tmp_path / "timm"))
    (tmp_path / "timm" / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config.json to tell the activation"):
        from_pretrained((sources / "text", tmp_path / "timm"))
    with pytest.raises(UserError, match=r"no config.json, expected a Hugging Face RoBERTa directory"):
        from_pretrained((tmp_path / "timm", sources / "vision"))
    with pytest.raises(UserError, match="got 3 sources, expected a directory or a pair"):
        from_pretrained((tmp_path, tmp_path, tmp_path))


def test_a_pair_is_strict(tmp_path: Path, sources: Path) -> None:
    tensors = load_file(sources / "vision" / "model.safetensors")
    del tensors["pre_layrnorm.bias"]
    tensors["surprise"] = torch.ones(1)
    (tmp_path / "config.json").write_text((sources / "vision" / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors are missing: pre_layrnorm.bias; 1 are not known: surprise"):
        from_pretrained((sources / "text", tmp_path))
    report = from_pretrained((sources / "text", tmp_path), strict=False).load_report
    assert report.missing == ("vision.norm_pre.bias",) and report.unexpected == ("surprise",)
    tensors["post_layernorm.bias"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"post_layernorm.bias has shape \(3,\), expected \(64,\)"):
        from_pretrained((sources / "text", tmp_path), strict=False)


def test_names_on_the_hub(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(sources / "text")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    from_pretrained(("someone/roberta-small", sources / "vision"))
    assert len(asked) == 1 and asked[0][0] == "someone/roberta-small"
    assert {"config.json", "model.safetensors", "model-*.safetensors"} <= set(asked[0][1])

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("We couldn't connect\nto 'https://huggingface.co'")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(timm, "create_model", offline)
    remedy = "a local directory with config.json and the weights works without a network"
    with pytest.raises(UserError, match=rf"^roberta-base: .*couldn't connect to.*{remedy}$"):
        from_pretrained(("roberta-base", sources / "vision"))
    with pytest.raises(UserError, match=rf"^timm:vit_x: .*couldn't connect to.*{remedy}$"):
        from_pretrained((sources / "text", "timm:vit_x"))
    with pytest.raises(UserError, match=r"^a/b/c: no such file or directory"):
        from_pretrained("a/b/c")


# -- our own directories -----------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path, tiny: SCLModel) -> None:
    tiny.save_pretrained(tmp_path / "new" / "model")
    assert sorted(os.listdir(tmp_path / "new" / "model")) == ["config.json", "model.safetensors"]
    again = SCLModel.from_pretrained(str(tmp_path / "new" / "model"))
    assert again.config == tiny.config
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny.state_dict().items())
    assert again.load_report.loaded == len(state)


def test_whoever_may_read_the_configuration_may_read_the_weights(tmp_path: Path, tiny: SCLModel) -> None:
    tiny.save_pretrained(tmp_path)
    tiny.save_pretrained(tmp_path)  # over those that are there
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1 and len(list(tmp_path.iterdir())) == 2


def test_a_temporal_table_that_images_do_not_read_may_be_dropped(tmp_path: Path) -> None:
    video = SCLModel(SCLConfig.preset("tiny").replace(max_frames=2, image_temporal="none")).eval()
    save_pretrained(video, tmp_path)
    images, pixels = from_pretrained(tmp_path, max_frames=0), torch.randn(1, 3, 32, 32)
    assert images.vision.temporal is None
    assert torch.equal(images.eval().vision(pixels).tokens, video.vision(pixels).tokens)


def test_a_directory_of_the_first_version(tmp_path: Path, tiny: SCLModel) -> None:
    """The keys of ``config.json`` before 0.1.0 was finished; they must stay readable."""
    values = {
        "width": 64, "vision_layers": 2, "text_layers": 2, "fusion_layers": 2, "image_size": 32, "patch_size": 8,
        "max_frames": 0, "vocab_size": 120, "max_text_len": 16, "text_positions": 18, "text_types": 1, "token_types": 2,
        "mlp_ratio": 4, "dropout": 0.1, "vision_activation": "quick_gelu", "projection_dim": 32,
        "patch_mask_token": True, "heads": ["itm", "mlm", "itc"], "vqa_answers": 10, "bos_id": 0, "pad_id": 1,
        "eos_id": 2, "mask_id": 119, "temperature_init": 0.07, "init_std": 0.02,
    }  # fmt: skip
    save_pretrained(tiny, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert from_pretrained(tmp_path).config == tiny.config


def test_a_directory_in_another_model(tmp_path: Path, tiny: SCLModel) -> None:
    save_pretrained(tiny, tmp_path)
    model = from_pretrained(tmp_path, image_size=48, max_frames=2, heads=("itm", "rank"), dropout=0.0)
    assert model.load_report.resized == ("vision.position 17 -> 37",)
    assert model.load_report.initialised == ("vision.temporal (zeros)", "rank_head (row 1 of itm_head)")
    assert model.load_report.dropped == ("itc", "mlm") and model.config.dropout == 0
    save_pretrained(model, tmp_path)
    with pytest.raises(UserError, match=r"are not known: vision.temporal"):
        from_pretrained(tmp_path, max_frames=0)


def test_mistakes_in_a_directory(tmp_path: Path, tiny: SCLModel, sources: Path) -> None:
    save_pretrained(tiny, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())

    def config(**changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(values | changes))

    config(widht=64)
    with pytest.raises(UserError, match=r"config.json: model.widht: unknown key, did you mean 'width'"):
        from_pretrained(tmp_path)
    config(width="64")
    with pytest.raises(UserError, match=r"config.json: "):
        from_pretrained(tmp_path)
    config(width=128)
    with pytest.raises(UserError, match=r"text.word.weight has shape .*expected .*another architecture"):
        from_pretrained(tmp_path)
    config(heads=["itm", "mlm", "itc", "vqa"])
    with pytest.raises(UserError, match=r"6 tensors are missing: vqa_head.0.weight"):
        from_pretrained(tmp_path)
    config()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"more": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 are not known: more"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in this directory"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: no such file"):
        from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"describes 'roberta', .*go in as a pair"):
        from_pretrained(sources / "text")
    with pytest.raises(UserError, match="is a file, expected a directory of save_pretrained"):
        from_pretrained(sources / "text" / "model.safetensors")


def test_saving_where_one_cannot(tmp_path: Path, tiny: SCLModel) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        tiny.save_pretrained(tmp_path / "file")
