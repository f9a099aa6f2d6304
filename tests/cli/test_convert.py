"""``sclkern convert``: a published checkpoint becomes a folder that loads."""

import torch

from sclkern import SCLConfig, SCLModel
from sclkern.cli import main
from sclkern.weights import to_reference


def test_convert_then_load(tmp_path, capsys):
    model = SCLModel(SCLConfig.preset("tiny").replace(mlp_ratio=4))
    torch.save({"state_dict": to_reference(model)}, tmp_path / "published.ckpt")
    assert main(["convert", str(tmp_path / "published.ckpt"), str(tmp_path / "out"), "--image-size", "48"]) == 0
    loaded = SCLModel.from_pretrained(tmp_path / "out")
    assert loaded.config.image_size == 48
    assert torch.equal(loaded.text.word.weight, model.text.word.weight)
