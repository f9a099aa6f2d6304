from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sclkern.models.config import HEADS

FRAMES = [pytest.param(None, id="images"), pytest.param(3, id="clips")]


def fused(model, batch, **options):
    text = model.encode_text(batch["text_ids"], batch["text_mask"])
    return model.run_fusion(text, batch["text_mask"], model.encode_image(batch["image"]), **options)


def build(make_model, make_batch, frames=None, **options):
    return make_model(max_frames=frames or 0, **options), make_batch(frames=frames)


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_eval_mode_drops_nothing(make_model, make_batch):
    model, batch = build(make_model, make_batch, dropout=0.5)
    assert torch.equal(fused(model, batch).text, fused(model, batch).text)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("stream", ["encode_text", "text", "image"])
def test_training_mode_drops_in_the_text_encoder_and_both_fusion_streams(make_model, make_batch, stream, backend):
    model, batch = build(make_model, make_batch, dropout=0.5)
    model.set_backend(backend).train()
    text, mask = model.encode_text(batch["text_ids"], batch["text_mask"]), batch["text_mask"]
    image = model.encode_image(batch["image"])

    def once():
        if stream == "encode_text":
            return model.encode_text(batch["text_ids"], mask)
        out = model.run_fusion(text, mask, image)
        return out.text if stream == "text" else out.image.tokens

    assert not torch.equal(once(), once())


def test_dropout_stands_where_the_published_model_has_it(make_model, make_batch, monkeypatch):
    model, batch = build(make_model, make_batch, dropout=0.1)
    model.set_backend("eager").train()
    shapes = []
    plain = F.dropout

    def counted(x, p=0.5, training=True, inplace=False):
        if training and p:
            assert p == 0.1
            shapes.append(tuple(x.shape))
        return plain(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", counted)
    text, mask = model.encode_text(batch["text_ids"], batch["text_mask"]), batch["text_mask"]
    # Embeddings; in each of two layers the probabilities, the attention's output and the feed-forward's.
    states, maps = (4, 12, 64), (4, 1, 12, 12)
    assert shapes == [states, *[maps, states, states] * 2]
    shapes.clear()
    image = model.encode_image(batch["image"])
    assert shapes == []
    model.run_fusion(text, mask, image)
    patches = (4, 17, 64)
    text_layer = [maps, states, (4, 1, 12, 17), states, states]
    image_layer = [(4, 1, 17, 17), patches, (4, 1, 17, 12), patches, patches]
    assert shapes == [*text_layer, *image_layer] * 2


# -- attention probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", FRAMES)
def test_fusion_probabilities_have_their_shapes_sum_to_one_and_skip_padding(make_model, make_batch, frames):
    model, batch = build(make_model, make_batch, frames)
    attentions = fused(model, batch, return_attention=True).attentions
    words, tokens = 12, 17 * (frames or 1)
    assert len(attentions) == 2
    for maps in attentions:
        shapes = [(words, words), (words, tokens), (tokens, tokens), (tokens, words)]
        assert [tuple(m.shape) for m in maps] == [(4, 1, *shape) for shape in shapes]
        for name, probabilities in maps._asdict().items():
            torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]), msg=name)
        padding = ~batch["text_mask"][:, None, None]
        for probabilities in (maps.text, maps.image_to_text):
            assert (probabilities.masked_select(padding.expand_as(probabilities)) == 0).all()


@pytest.mark.parametrize("frames", FRAMES)
def test_gradients_reach_the_probabilities(make_model, make_batch, frames):
    model, batch = build(make_model, make_batch, frames)
    out = fused(model, batch, return_attention=True)
    score = model.itm_head(model.pool(*out.cls))[:, 1].sum()
    for index, maps in enumerate(out.attentions):
        for name, probabilities in maps._asdict().items():
            (gradient,) = torch.autograd.grad(score, probabilities, retain_graph=True)
            assert gradient.abs().sum() > 0, (index, name)


@pytest.mark.parametrize("frames", FRAMES)
def test_asking_for_probabilities_changes_no_output(make_model, make_batch, frames):
    model, batch = build(make_model, make_batch, frames)
    plain, asked = fused(model, batch), fused(model, batch, return_attention=True)
    assert plain.attentions is None
    mask = batch["text_mask"]
    torch.testing.assert_close(asked.text[mask], plain.text[mask], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(asked.image.tokens, plain.image.tokens, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("frames", FRAMES)
def test_encoders_give_their_probabilities_too(make_model, make_batch, frames):
    model, batch = build(make_model, make_batch, frames)
    text_maps, image_maps = [], []
    text = model.encode_text(batch["text_ids"], batch["text_mask"], attentions=text_maps)
    image = model.encode_image(batch["image"], attentions=image_maps)
    tokens = 17 * (frames or 1)
    assert [tuple(m.shape) for m in text_maps] == [(4, 1, 12, 12)] * 2
    assert [tuple(m.shape) for m in image_maps] == [(4, 1, tokens, tokens)] * 2
    if frames:
        # Frame by frame, CLS first in each: a patch (row 1) of the first frame sees that frame alone.
        assert (image_maps[0][:, :, 1, 17:] == 0).all()
        assert (image_maps[0][:, :, 0] > 0).all()
    plain = model.encode_text(batch["text_ids"], batch["text_mask"])
    torch.testing.assert_close(text[batch["text_mask"]], plain[batch["text_mask"]], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(image.tokens, model.encode_image(batch["image"]).tokens, rtol=1e-9, atol=1e-10)


def test_an_unknown_backend_is_refused(make_model):
    with pytest.raises(ValueError, match="backend: got 'bogus', expected one of auto, triton, sdpa, flash, eager"):
        make_model().set_backend("bogus")


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_head_exists_when_the_config_lists_it(make_model, head):
    parts = {
        "itm": {"itm_head"}, "mlm": {"mlm_head"}, "itc": {"text_projection", "image_projection", "temperature"},
        "vqa": {"vqa_head"}, "nlvr2": {"nlvr2_head"}, "rank": {"rank_head"},
    }  # fmt: skip
    everything = set().union(*parts.values())
    names = {name.partition(".")[0] for name, _ in make_model(heads=(head,)).named_parameters()}
    assert names & everything == parts[head]


def test_pooling_is_text_first_then_the_mean_of_the_frames(make_model, make_batch):
    model, batch = build(make_model, make_batch, frames=3)
    out = fused(model, batch)
    text, image = model.text_pooler.dense, model.image_pooler.dense
    expected = torch.cat([text(out.text[:, 0]).tanh(), image(out.image.cls.sum(1) / 3).tanh()], dim=-1)
    torch.testing.assert_close(model.pool(*out.cls), expected)


def test_the_image_type_chooses_the_row_of_the_modality_table(make_model, make_batch):
    model, batch = make_model(token_types=3), make_batch()
    second = fused(model, batch, image_type=2)
    with torch.no_grad():
        model.modality.weight[1] = model.modality.weight[2]
    assert torch.equal(fused(model, batch).text, second.text)
