"""Which pairs are drawn, and what is drawn of them."""

import io
import warnings

import matplotlib.image
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from sclkern import SCLConfig, SCLModel
from sclkern.data import open_pairs
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.text import one_line
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
    undecodable |= {0, 2, 5}
    assert choose_pairs(source, 9) == []


def test_images_smaller_than_a_patch_are_not_chosen(source):
    assert choose_pairs(source, 9, 40) == [1, 3, 4]
    assert choose_pairs(source, 9, 41) == []


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


@pytest.mark.parametrize("caption", ["ein schönes Café", "東京 a", "a 🤖 b", "שלום a", "two\nlines\tand"])
def test_words_beyond_ascii_are_whole(model, caption):
    maps = word_attention(model, torch.randn(3, 32, 32), caption, TOKENIZER)
    assert [word for word, _ in maps] == ["whole text", *caption.split()]


HARD = [
    "$$ cash $$", "$_$ shirt", r"a $\frac{1}{0}$ b^{2}_ %s", "🤖 🦄 in 東京", "שלום עולם مرحبا",
    "two\nlines\tand\0\x1b[2J", "<b>&amp;</b> `x` | [a](b)", "a" * 10_000, "word " * 2_000, "e\u0301" * 300,
    "\u202e\ufeff\u200d", r"\badcommand{",
]  # fmt: skip


def test_captions_are_drawn_as_they_are(model, source, tmp_path, monkeypatch):
    """Whatever the captions, the plot has the size and, outside its titles, the pixels of one of plain captions."""
    titles = []
    set_title = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **k: titles.append(text) or set_title(self, text, **k))
    transform = build_transform("clip_test", 32)

    def plot(captions):
        monkeypatch.setattr(source, "caption", lambda pair: captions[pair % len(captions)])
        path = tmp_path / "attention.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot_attention(path, model, source, range(len(CAPTIONS)), TOKENIZER, transform, words_shown=2)
        return matplotlib.image.imread(path)

    plain = plot(["a cat"])
    for captions in (HARD[:6], HARD[6:]):
        titles.clear()
        pixels = plot(captions)
        assert pixels.shape == plain.shape and pixels[..., :3].std() > 0.05
        assert max(map(len, titles)) <= 24 and not any("\n" in title or "\0" in title for title in titles)
        for caption in captions:
            assert one_line(caption, 24) in titles


def test_titles_are_no_formulas_whatever_the_settings(model, source, tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
        path = tmp_path / "attention.png"
        plot_attention(path, model, source, [3], TOKENIZER, build_transform("clip_test", 32))
    assert matplotlib.image.imread(path)[..., :3].std() > 0.05
