"""Exported models, and a picture."""

import pytest
from exported_model import export
from PIL import Image


@pytest.fixture(scope="session")
def exported(make_model, tmp_path_factory):
    """Folders of models: of images, and of clips."""
    folder = tmp_path_factory.mktemp("exported")
    export(make_model, folder / "images", heads=("itm", "itc"))
    export(make_model, folder / "clips", max_frames=4, heads=("vqa",), max_text_len=24, text_positions=26)
    return folder


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.effect_noise((90, 60), 90).convert("RGB").save(file)
    return file
