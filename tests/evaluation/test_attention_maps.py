"""Which pairs are drawn, and what is drawn of them."""

import io

import matplotlib.image
import pytest
import torch
from PIL import Image

from sclkern import SCLConfig, SCLModel
from sclkern.data import open_pairs
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.evaluation.attention_maps import choose_pairs, plot_attention, word_attention

CAPTIONS = ["cat", "a red car", "a red car", "costs $$ and $_$ more", "the old green tree", "dog"]
TOKENIZER = CaptionTokenizer.from_pretrained("demo")


@pytest.fixture
def source(tmp_path):
    rows = []
    for i, caption in enumerate(CAPTIONS):
        stream = io.BytesIO()
        Image.effect_noise((40, 40), 90).convert("RGB").rotate(i).save(stream, "PNG")
        rows.append({"image": stream.getvalue(), "caption": [caption]})
    write_pairs(tmp_path / "t.arrow", rows)
    return open_pairs(tmp_path, ["t"])


@pytest.fixture
def model():
    return SCLModel(SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047)).eval()


def test_different_captions_of_three_words_are_chosen(source):
    assert choose_pairs(source, 9) == [1, 3, 4]
    assert choose_pairs(source, 2) == [1, 4]


def test_others_are_chosen_in_place_of_undecodable_images(source, monkeypatch):
    read, undecodable = source.image, {4}

    def image(index):
        if index in undecodable:
            raise ValueError("broken")
        return read(index)

    monkeypatch.setattr(source, "image", image)
    assert choose_pairs(source, 2) == [1, 3]
    undecodable |= {1, 3}
    assert choose_pairs(source, 9) == [0, 5]


def test_maps_are_those_of_the_last_fusion_layer(model):
    pixels = torch.randn(3, 32, 32)
    caption = "hammer and wrench, spanner"
    with torch.no_grad():
        maps = word_attention(model, pixels, caption, TOKENIZER)
        ids, mask = TOKENIZER([caption], 50)
        fused = model.run_fusion(
            model.encode_text(ids, mask), mask, model.encode_image(pixels[None]), return_attention=True
        )
    probabilities = fused.attentions[-1].text_to_image[0].amax(0)[:, 1:]
    assert [word for word, _ in maps] == ["whole text", *caption.split()]
    assert all(heat.shape == (model.config.grid, model.config.grid) for _, heat in maps)
    torch.testing.assert_close(maps[0][1].flatten(), probabilities[0])
    # Every token between bos and eos belongs to one word.
    torch.testing.assert_close(
        sum(heat.flatten() for _, heat in maps[1:]), probabilities[1 : int(mask.sum()) - 1].sum(0)
    )


def test_a_caption_with_dollar_signs_is_drawn_as_it_is(model, source, tmp_path):
    path = tmp_path / "attention.png"
    plot_attention(path, model, source, [3, 4], TOKENIZER, build_transform("clip_test", 32))
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.05
