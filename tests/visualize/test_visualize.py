"""``sclkern visualize``: what it writes, and what it refuses."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from exported_model import TOKENIZER, export
from PIL import Image

from clip_files import write_clip
from sclkern import SCLModel
from sclkern.cli import main
from sclkern.training.opening import open_model
from sclkern.visualize.maps import TARGETS, attention_maps, record, relevancy
from sclkern.visualize.overlay import OPACITY, colours, overlay
from sclkern.visualize.pair import read_pair

CAPTION = "a hammer, a wrench"
WORDS = ["whole text", "a", "hammer,", "a", "wrench"]


def data_of(page):
    """The numbers of a page."""
    found = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
    for kind in found["kinds"]:
        for name, text in kind.items():
            kind[name] = np.frombuffer(base64.b64decode(text), "<f4")
    return found


def test_a_picture(exported, picture, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["visualize", str(exported / "images"), str(picture), CAPTION, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    files = ["00_whole_text.png", "01_a.png", "02_hammer.png", "03_a.png", "04_wrench.png"]
    for part in ("attention", "attention_back", "relevancy", "relevancy_back"):
        assert sorted(file.name for file in (out / part).iterdir()) == files
        assert {Image.open(file).size for file in (out / part).iterdir()} == {(256, 171)}
    assert sorted(path.name for path in out.iterdir())[-3:] == ["index.html", "relevancy", "relevancy_back"]

    model = SCLModel.from_pretrained(exported / "images").eval()
    pair = read_pair(model.config, TOKENIZER, picture, CAPTION)
    recorded = record(model, pair.pixels, pair.ids)
    logit = TARGETS["itm"](model, recorded.fused)
    assert printed == f"{out / 'index.html'}: 4 words, 1 frames, relevancy for itm {logit.item():.4g}\n"
    raw = [attention_maps(recorded, layer) for layer in (1, 0)]
    data = data_of((out / "index.html").read_text())
    assert data["words"] == WORDS and (data["frames"], data["grid"]) == (1, 4)
    assert len(data["kinds"]) == 3
    for kind, maps in zip(data["kinds"], [relevancy(recorded, logit), *raw], strict=True):
        for number, (_, positions) in enumerate(pair.words):
            expected = maps.text_to_image[positions, 1:].sum(0).numpy()
            np.testing.assert_allclose(kind["to_image"].reshape(5, 16)[number], expected, rtol=1e-6)
            expected = maps.image_to_text[:, positions].sum(1).numpy()
            np.testing.assert_allclose(kind["from_frames"][number], expected[0], rtol=1e-6)
            np.testing.assert_allclose(kind["from_image"].reshape(5, 16)[number], expected[1:], rtol=1e-6)


@pytest.mark.parametrize("form", ["video", "folder"])
def test_a_clip(exported, tmp_path, form, capsys):
    if form == "video":
        clip = tmp_path / "clip.mp4"
        write_clip(clip)
    else:
        clip = tmp_path / "frames"
        clip.mkdir()
        for number in range(5):
            Image.new("RGB", (40, 30), (50 * number, 90, 10)).save(clip / f"{number}.png")
    out = tmp_path / "out"
    arguments = [str(exported / "clips"), str(clip), CAPTION, "--output", str(out), "--frames", "3"]
    assert main(["visualize", *arguments]) == 0
    assert "3 frames, relevancy for vqa" in capsys.readouterr().out
    page = (out / "index.html").read_text()
    assert len(re.findall("<figure>", page)) == 3 and data_of(page)["frames"] == 3
    with Image.open(out / "relevancy" / "00_whole_text.png") as strip:
        assert strip.width % 3 == 0 and strip.width > 2 * strip.height


def test_an_overlay_covers_nothing_where_a_map_is_0():
    frames = [Image.new("RGB", (8, 8), (10, 200, 30)), Image.new("RGB", (8, 8), (90, 0, 30))]
    maps = torch.zeros(2, 2, 2)
    maps[1] = 0.25
    drawn = np.asarray(overlay(frames, maps))
    assert drawn.shape == (8, 16, 3) and (drawn[:, :8] == (10, 200, 30)).all()
    expected = (1 - OPACITY) * np.array((90, 0, 30)) + OPACITY * colours()[255]
    assert (np.abs(drawn[:, 8:] - expected) < 0.51).all()
    assert np.array_equal(np.asarray(overlay(frames, 0 * maps)), np.concatenate([np.asarray(f) for f in frames], 1))


def test_a_checkpoint_without_a_head_shows_attention_alone(make_model, picture, tmp_path, capsys):
    export(make_model, tmp_path / "model", heads=("itc",))
    arguments = [str(tmp_path / "model"), str(picture), "cat", "--output", str(tmp_path / "out")]
    assert main(["visualize", *arguments]) == 0
    assert "no relevancy, for the model has no head for it" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["attention", "attention_back", "index.html"]
    with pytest.raises(SystemExit):
        main(["visualize", *arguments[:-1], str(tmp_path / "other"), "--target", "mlm"])


def refused(capsys, tmp_path, *arguments, output=None):
    """The message of a refusal that writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert main(["visualize", *map(str, arguments), "--output", str(output or tmp_path / "out")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err


def test_what_is_refused(exported, picture, tmp_path, capsys):
    def message(picture=picture, caption=CAPTION, model="images", options=(), output=None):
        return refused(capsys, tmp_path, exported / model, picture, caption, *options, output=output)

    long = message(caption="hammer " * 40)
    assert "caption: has " in long and "expected at most 16 (max_text_len of the model), and would be cut" in long
    assert "but the caption is blank; give a text" in message(caption="  ")
    assert "no such file, expected a picture" in message(picture=tmp_path / "none.png")
    assert "is a folder, expected a picture; of a clip, add --frames N" in message(picture=tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    assert "it is an HTML page; give a JPEG, PNG" in message(picture=tmp_path / "broken.jpg")
    Image.new("RGB", (40, 7)).save(tmp_path / "flat.png")
    assert "is 40 x 7 pixels, smaller than a patch (8)" in message(picture=tmp_path / "flat.png")
    assert "the model is one of images alone (max_frames 0)" in message(options=["--frames", "2"])
    assert "expected 1 to 4 (max_frames of the model)" in message(model="clips", options=["--frames", "5"])
    assert "expected 1 to 4" in message(model="clips", options=["--frames", "0"])
    assert "the file is a picture (png_pipe), expected a video" in message(model="clips", options=["--frames", "2"])
    (tmp_path / "nothing").mkdir()
    folder = message(model="clips", picture=tmp_path / "nothing", options=["--frames", "2"])
    assert "the folder has no frame" in folder and "give a video, or a folder of frames" in folder
    assert "--target: got 'vqa', the model has itm; choose one of these" in message(options=["--target", "vqa"])
    assert "is not empty, expected a new folder" in message(output=tmp_path)
    assert "no such checkpoint" in message(model="none")


def test_a_checkpoint_without_a_tokenizer(make_model, picture, tmp_path, capsys):
    model = make_model(vocab_size=2048, mask_id=2047)
    model.save_pretrained(tmp_path / "model")
    arguments = [tmp_path / "model", picture, CAPTION]
    message = refused(capsys, tmp_path, *arguments)
    assert "has no tokenizer.json" in message and "name it: --tokenizer FOLDER|NAME" in message
    assert main(["visualize", *map(str, arguments), "--output", str(tmp_path / "out"), "--tokenizer", "demo"]) == 0


def test_a_checkpoint_of_another_tokenizer(make_model, picture, tmp_path, capsys):
    make_model(vocab_size=120).save_pretrained(tmp_path / "model")
    message = refused(capsys, tmp_path, tmp_path / "model", picture, CAPTION, "--tokenizer", "demo")
    assert "tokenizer: demo has vocab_size 2048" in message and "was trained with 120" in message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"fusion_layers": 0}, "has no fusion layer"), ({}, "gives no finite numbers for this pair")],
)
def test_models_that_show_nothing(make_model, picture, tmp_path, capsys, changes, problem):
    model = make_model(vocab_size=2048, mask_id=2047, **changes)
    with torch.no_grad():
        model.text_transform.bias[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    assert problem in refused(capsys, tmp_path, tmp_path / "model", picture, "cat", "--tokenizer", "demo")


def test_a_model_opens_with_its_tokenizer(exported):
    model, tokenizer = open_model(exported / "images")
    assert model.training and tokenizer.vocab_size == model.config.vocab_size
