from __future__ import annotations

import dataclasses
import json

import pytest

from sclkern import SCLConfig, UserError
from sclkern.models.config import PRESETS
from sclkern.weights.pretrained import stored_config

BAD = [
    ("width", 0), ("width", -64), ("width", 96),
    ("image_size", 0), ("image_size", 30), ("patch_size", 0), ("patch_size", -8),
    ("vision_layers", -1), ("text_layers", -1), ("fusion_layers", -1), ("max_frames", -1),
    ("vocab_size", 0), ("max_text_len", 0), ("text_types", 0), ("mlp_ratio", 0), ("projection_dim", 0),
    ("token_types", 1), ("text_positions", 17),
    ("bos_id", -1), ("eos_id", 120), ("mask_id", 120), ("mask_id", -1),
    ("heads", ("itm", "bogus")), ("vision_activation", "relu"), ("dropout", 1.0), ("dropout", -0.1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(UserError, match=f"^{name}: got ") as error:
        SCLConfig.preset("tiny").replace(**{name: value})
    assert "\n" not in str(error.value)


def test_positions_suffice_for_the_longest_caption_and_the_offset():
    tiny = SCLConfig.preset("tiny")
    assert tiny.replace(max_text_len=16, text_positions=18).text_positions == 18
    with pytest.raises(UserError, match="text_positions: got 18, expected at least 19"):
        tiny.replace(max_text_len=17)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"model\.vision_layer: unknown key, did you mean 'vision_layers'\?"):
        SCLConfig.from_dict({"vision_layer": 3})
    with pytest.raises(UserError, match=r"model\.qqqq: unknown key; known: "):
        SCLConfig.from_dict({"qqqq": 3})


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match="preset: got 'huge', expected one of tiny, demo, base, base_video"):
        SCLConfig.preset("huge")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name, tmp_path):
    config = SCLConfig.preset(name)
    config.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sclkern"
    assert stored_config(tmp_path / "config.json") == config


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["tiny"] = SCLConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCLConfig.preset("tiny").width = 128


def test_replacing_leaves_the_original():
    tiny = SCLConfig.preset("tiny")
    assert tiny.replace(width=128).width == 128
    assert tiny.width == 64


def test_the_base_model_has_the_published_sizes():
    base, video = SCLConfig.preset("base"), SCLConfig.preset("base_video")
    assert (base.num_heads, base.grid, base.num_patches) == (12, 18, 324)
    assert (video.num_heads, video.num_patches, video.max_frames) == (12, 196, 8)


def test_heads_of_a_list_are_those_of_a_tuple():
    assert SCLConfig(heads=["itm", "itc"]) == SCLConfig(heads=("itm", "itc"))
