"""Published SCL and METER checkpoints into a model and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from same_state import assert_states_equal
from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.models import SCLConfig
from sclkern.weights import LoadReport, to_reference
from sclkern.weights.loading import resize_positions

GOLDEN = Path(__file__).parents[1] / "golden"
VISUAL = "vision_transformer.visual."
from_reference = SCLModel.from_reference
METER_LACKS = ("cl_temp", "vision_proj.", "language_proj.", VISUAL + "visual_mask_token", VISUAL + "temporal_embed")


def golden(case: str, group: str = "w.") -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return {key[len(group) :]: tensor for key, tensor in tensors.items() if key.startswith(group)}


def load_reference(weights: Mapping[str, Tensor], **options) -> tuple[SCLModel, LoadReport]:
    model = from_reference(weights, **options)
    return model, model.load_report


@pytest.fixture(params=["image", "video"])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def without(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}


# -- published checkpoints ---------------------------------------------------------------------------------------------


def test_golden_weights_and_back(case: str) -> None:
    weights = golden(case)
    model, report = load_reference(weights)
    assert report is model.load_report and report.loaded == len(model.state_dict())
    assert set(report.ignored) == {f"text_transformer.pooler.dense.{kind}" for kind in ("weight", "bias")}
    assert not (report.missing or report.unexpected or report.resized or report.initialised or report.dropped)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    back = to_reference(model)
    assert_states_equal(back, {key: tensor.float() for key, tensor in without(weights, *report.ignored).items()})
    save_file(back, "/dev/null")  # refuses tensors that share memory


def test_golden_numbers(case: str) -> None:
    model = from_reference(golden(case)).eval()
    inputs, outputs = golden(case, "in."), golden(case, "out.")
    with torch.no_grad():
        tokens = model.vision(inputs["image" if case == "image" else "video"].float()).tokens
    torch.testing.assert_close(tokens, outputs["vision.tokens"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
@pytest.mark.parametrize("wrap", [lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}, lambda w: w])
def test_files_and_prefixes(tmp_path: Path, prefix: str, wrap) -> None:
    weights = golden("image")
    torch.save(wrap({prefix + key: tensor for key, tensor in weights.items()}), tmp_path / "scl.ckpt")
    assert_states_equal(
        SCLModel.from_reference(tmp_path / "scl.ckpt").state_dict(), from_reference(weights).state_dict()
    )


def meter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model as METER would have it."""
    weights = without(weights, *METER_LACKS)
    weights = {key.replace("vision_transformer.", "vit_model."): tensor for key, tensor in weights.items()}
    width = weights["vit_model.visual.class_embedding"].shape[0]
    weights["vit_model.token_embedding.weight"] = torch.ones(9, width)
    weights["vit_model.positional_embedding"] = torch.ones(7, width)
    weights |= {f"vit_model.ln_final.{kind}": torch.ones(width) for kind in ("weight", "bias")}
    return weights


def test_meter() -> None:
    weights = golden("image")
    model, report = load_reference(meter(weights))
    assert model.config.heads == ("itm", "mlm", "vqa", "nlvr2", "rank") and not model.config.patch_mask_token
    assert len(report.ignored) == 6 and not report.unexpected
    expected = from_reference(weights).state_dict()
    assert_states_equal(model.state_dict(), {name: expected[name] for name in model.state_dict()})

    continued = from_reference(meter(weights), heads=("itm", "mlm", "itc"), patch_mask_token=True)
    assert set(continued.load_report.initialised) == {
        "image_projection", "text_projection", "temperature", "vision.mask_token",
    }  # fmt: skip
    assert continued.load_report.dropped == ("nlvr2", "rank", "vqa")


def test_dead_decoder_is_ignored() -> None:
    weights = golden("image")
    dead = {
        "vision_transformer.decoder_embed.weight": torch.ones(2, 2),
        "vision_transformer.mask_token": torch.ones(1, 1, 2),
        "vision_transformer.decoder_pos_embed": torch.ones(1, 3, 2),
        "vision_transformer.decoder_blocks.0.norm1.weight": torch.ones(2),
        "vision_transformer.decoder_norm.bias": torch.ones(2),
        "vision_transformer.decoder_pred.bias": torch.ones(2),
        "text_transformer.embeddings.position_ids": torch.ones(1, 18, dtype=torch.int64),
    }
    model, report = load_reference(weights | dead)
    assert dead.keys() < set(report.ignored)
    assert_states_equal(model.state_dict(), from_reference(weights).state_dict())


def test_report_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sclkern.weights"):
        from_reference(golden("image"))
        from_reference(golden("image") | {"extra": torch.ones(1)}, strict=False)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert caplog.messages[0] == (
        "state_dict: 177 parameters loaded; ignored: text_transformer.pooler.dense.bias, "
        "text_transformer.pooler.dense.weight"
    )
    assert "unexpected: extra" in caplog.messages[1]


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected() -> None:
    weights = golden("image")
    key = "cross_modal_text_layers.0.attention.self.key.weight"
    damaged = without(weights, key, "cl_temp") | {f"extra.{i:02}": torch.ones(1) for i in range(11)}
    with pytest.raises(UserError) as error:
        from_reference(damaged)
    assert str(error.value) == (
        f"state_dict: 2 tensors are missing: cl_temp, {key}; 11 are not known: "
        + ", ".join(f"extra.{i:02}" for i in range(8))
        + " and 3 more; strict=False loads the rest and reports these"
    )
    model, report = load_reference(damaged, strict=False)
    assert report.missing == ("temperature", "fusion.text_layers.0.attention.in_proj.weight")
    assert report.unexpected == tuple(f"extra.{i:02}" for i in range(11))
    assert report.loaded == len(model.state_dict()) - 2


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("cross_modal_text_transform.weight", torch.ones(128, 64), r"has shape \(128, 64\), expected \(128, 128\)"),
        ("itm_score.fc.bias", torch.ones(1, 3), r"itm_score.fc.bias has shape \(3,\), expected \(2,\)"),
        (
            "text_transformer.encoder.layer.1.attention.self.value.bias",
            torch.ones(64),
            r"value.bias has shape \(64,\), expected that of .*query.bias, \(128,\)",
        ),
        (VISUAL + "positional_embedding", torch.ones(38, 128), "37 patches, expected a square grid"),
        (VISUAL + "positional_embedding", torch.ones(128), "expected 2 dimensions"),
        (VISUAL + "positional_embedding", torch.ones(1, 128), "0 patches, expected a square grid"),
        (VISUAL + "conv1.weight", torch.ones(128, 3, 0, 0), "expected 4 dimensions"),
        (VISUAL + "class_embedding", torch.ones([]), r"class_embedding has shape \(\), expected \(128,\)"),
        (VISUAL + "ln_pre.bias", torch.ones(128, dtype=torch.int8), "dtype torch.int8, expected a floating dtype"),
        ("text_transformer.embeddings.word_embeddings.weight", torch.ones(600, 100), "width 100, expected a multiple"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_wrong_tensors(key: str, tensor: Tensor, message: str, strict: bool) -> None:
    with pytest.raises(UserError, match=message):
        from_reference(golden("image") | {key: tensor}, strict=strict)


def test_not_a_published_checkpoint() -> None:
    with pytest.raises(UserError, match=r"no tensor .*word_embeddings.weight.* among its 1, .*from_pretrained"):
        from_reference({"a": torch.ones(2)})
    with pytest.raises(UserError, match="unknown key, did you mean 'image_size'"):
        from_reference(golden("image"), image_sise=64)


# -- another model than the checkpoint's -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128, 288])
def test_positions_are_resized_as_the_reference_does(size: int) -> None:
    weights = golden("image")
    table = weights[VISUAL + "positional_embedding"].float()
    model, report = load_reference(weights, image_size=size)
    old = table[1:].reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=(size // 16, size // 16), mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(model.vision.position, torch.cat([table[:1], new]))
    assert report.resized == (f"vision.position 37 -> {1 + (size // 16) ** 2}",)
    assert model.vision(torch.zeros(1, 3, size, size)).tokens.shape[1] == 1 + (size // 16) ** 2


def test_resizing_to_the_same_grid_changes_nothing() -> None:
    table = torch.randn(37, 8)
    assert torch.equal(resize_positions(table, 6), table)


def test_frames_on_an_image_checkpoint_keep_the_numbers_of_images() -> None:
    weights = golden("image")
    images = golden("image", "in.")["image"].float()
    model, report = load_reference(weights, max_frames=8)
    assert report.initialised == ("vision.temporal (zeros)",) and report.loaded == len(model.state_dict()) - 1
    with torch.no_grad():
        assert torch.equal(model.vision(images).tokens, from_reference(weights).vision(images).tokens)


def test_a_video_checkpoint_in_other_models() -> None:
    weights = golden("video")
    with pytest.raises(UserError, match=rf"1 are not known: {VISUAL}temporal_embed; strict=False"):
        from_reference(weights, max_frames=0)
    report = from_reference(weights, max_frames=0, strict=False).load_report
    assert report.unexpected == (VISUAL + "temporal_embed",)
    shorter = from_reference(weights, max_frames=3)
    assert torch.equal(shorter.vision.temporal, weights[VISUAL + "temporal_embed"][0, :3].float())
    assert shorter.load_report.resized == ("vision.temporal 8 -> 3",)
    with pytest.raises(UserError, match=r"temporal_embed has shape \(8, 128\), expected \(9, 128\)"):
        from_reference(weights, max_frames=9)


def test_downstream_heads() -> None:
    weights = without(golden("image"), "nlvr2_classifier.", "rank_output.", "vqa_classifier.")
    weights["token_type_embeddings.weight"] = weights["token_type_embeddings.weight"][:2]
    model, report = load_reference(weights, heads=("itm", "nlvr2", "rank", "vqa"), vqa_answers=5)
    assert model.config.token_types == 3
    assert torch.equal(model.modality.weight[:2], weights["token_type_embeddings.weight"].float())
    assert torch.equal(model.modality.weight[2], model.modality.weight[1])
    assert torch.equal(model.rank_head.weight, weights["itm_score.fc.weight"][1:].float())
    assert torch.equal(model.rank_head.bias, weights["itm_score.fc.bias"][1:].float())
    assert report.initialised == (
        "modality.weight row 2 (copy of row 1)", "rank_head (row 1 of itm_head)", "nlvr2_head", "vqa_head",
    )  # fmt: skip
    assert report.dropped == ("itc", "mlm") and not report.missing
    ranker = from_reference(weights, heads=("rank",))
    assert torch.equal(ranker.rank_head.weight, model.rank_head.weight)


def test_config_given(case: str) -> None:
    weights = golden(case)
    config = from_reference(weights).config
    assert from_reference(weights, config=config.replace(dropout=0.0)).config.dropout == 0
    with pytest.raises(UserError, match=rf"are not known: {VISUAL}transformer.resblocks.1.attn.in_proj_bias"):
        from_reference(weights, config=config.replace(vision_layers=1))
    with pytest.raises(UserError, match="another architecture"):
        from_reference(weights, config=config.replace(width=64))
    # What tells a size may be missing when the config tells it.
    report = from_reference(without(weights, VISUAL + "conv1"), config=config, strict=False).load_report
    assert report.missing == ("vision.patch_embed.weight",)


def test_published_code_has_quick_gelu() -> None:
    with pytest.raises(UserError, match="vision_activation: got 'gelu', expected 'quick_gelu'"):
        to_reference(SCLModel(SCLConfig.preset("tiny").replace(vision_activation="gelu")))
