"""Maps of attention and relevancy, beside the model's own output and beside the rule computed number by number."""

import numpy as np
import pytest
import torch

from sclkern import reference
from sclkern.visualize.maps import TARGETS, attention_maps, of_words, record, relevancy

IDS = torch.tensor([0, 17, 42, 9, 30, 2])


def pair(make_model, frames, **changes):
    model = make_model(**({"max_frames": 3} if frames > 1 else {}), **changes)
    shape = (3, 32, 32) if frames == 1 else (frames, 3, 32, 32)
    return model, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_what_is_recorded_is_what_the_model_computes(make_model, frames, backend):
    model, pixels = pair(make_model, frames, heads=("itm", "vqa", "rank"))
    model.set_backend(backend)
    with torch.no_grad():
        mask = torch.ones(1, 6, dtype=torch.bool)
        fused = model.run_fusion(model.encode_text(IDS[None], mask), mask, model.encode_image(pixels[None]))
        pooled = model.pool(*fused.cls)
        recorded = record(model, pixels, IDS)
        targets = {name: target(model, recorded.fused).item() for name, target in TARGETS.items()}
    torch.testing.assert_close(recorded.fused.text, fused.text, rtol=0, atol=1e-12)
    torch.testing.assert_close(recorded.fused.image.tokens, fused.image.tokens, rtol=0, atol=1e-12)
    assert targets == pytest.approx(
        {
            "itm": model.itm_head(pooled)[0, 1].item(),
            "rank": model.rank_head(pooled).item(),
            "vqa": model.vqa_head(pooled).max().item(),
        },
        abs=1e-12,
    )
    assert [len(recorded.text), len(recorded.vision), len(recorded.fusion)] == [2, 2, 2]


def test_attention_is_the_largest_of_the_heads(make_model):
    model, pixels = pair(make_model, 1, width=128)
    recorded = record(model, pixels, IDS)
    for layer in (0, 1):
        maps = attention_maps(recorded, layer)
        for name, map_ in maps._asdict().items():
            heads = getattr(recorded.fusion[layer], name)[0]
            assert heads.shape[0] == 2 and not map_.requires_grad
            torch.testing.assert_close(map_, torch.maximum(heads[0], heads[1]))
    assert torch.equal(attention_maps(recorded).text_to_image, maps.text_to_image)


def gradients_by_differences(model, pixels, monkeypatch, number, direction):
    """Change of the logit of matching along a direction of the attention probabilities that are computed as the
    ``number``-th."""
    original = reference.attention_probabilities
    values = []
    for step in (1e-5 * direction, -1e-5 * direction):
        count = iter(range(1000))

        def moved(*arguments, step=step, count=count, **options):
            found = original(*arguments, **options)
            return found + step if next(count) == number else found

        monkeypatch.setattr(reference, "attention_probabilities", moved)
        with torch.no_grad():
            values.append(TARGETS["itm"](model, record(model, pixels, IDS).fused).item())
        monkeypatch.undo()
    return (values[0] - values[1]) / 2e-5


def rule(recorded, gradients):
    """The relevancy rule, number by number, as the paper's equations 5 to 11 read."""

    def weighted(probabilities, gradient):
        heads, rows, columns = probabilities.shape
        return [
            [
                sum(max(0.0, probabilities[h, i, j] * gradient[h, i, j]) for h in range(heads)) / heads
                for j in range(columns)
            ]
            for i in range(rows)
        ]

    def product(a, b):
        return [[sum(x * b[k][j] for k, x in enumerate(row)) for j in range(len(b[0]))] for row in a]

    def plus(a, b):
        return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]

    def transposed(a):
        return [list(column) for column in zip(*a, strict=True)]

    def normal(r):
        added = [[x - (i == j) for j, x in enumerate(row)] for i, row in enumerate(r)]
        return [
            [(x / sum(row) if sum(row) else 0.0) + (i == j) for j, x in enumerate(row)] for i, row in enumerate(added)
        ]

    def eye(n):
        return [[float(i == j) for j in range(n)] for i in range(n)]

    maps = [one[0].detach().numpy() for one in (*recorded.text, *recorded.vision)]
    maps += [one[0].detach().numpy() for layer in recorded.fusion for one in layer]
    cams = [weighted(p, g[0].numpy()) for p, g in zip(maps, gradients, strict=True)]
    words, tokens = len(cams[0]), len(cams[len(recorded.text)])
    tt, ii = eye(words), eye(tokens)
    ti, it = [[0.0] * tokens for _ in range(words)], [[0.0] * words for _ in range(tokens)]
    for cam in cams[: len(recorded.text)]:
        tt = plus(tt, product(cam, tt))
    frames = recorded.fused.image.num_frames
    length = tokens // frames
    order = [f * length for f in range(frames)] + [f * length + p for f in range(frames) for p in range(1, length)]
    for cam in cams[len(recorded.text) :][: len(recorded.vision)]:
        ii = plus(ii, product([[cam[i][j] for j in order] for i in order], ii))
    rest = cams[len(recorded.text) + len(recorded.vision) :]
    for text, text_to_image, image, image_to_text in zip(*[iter(rest)] * 4, strict=True):
        old_tt, old_ti, old_ii, old_it = tt, ti, ii, it
        tt, ti = plus(tt, product(text, tt)), plus(ti, product(text, ti))
        ii, it = plus(ii, product(image, ii)), plus(it, product(image, it))
        ti = plus(ti, product(product(transposed(normal(tt)), text_to_image), normal(old_ii)))
        it = plus(it, product(product(transposed(normal(ii)), image_to_text), normal(old_tt)))
        tt = plus(tt, product(text_to_image, old_it))
        ii = plus(ii, product(image_to_text, old_ti))
    return tt, ti, ii, it


@pytest.mark.parametrize("frames", [1, 2])
def test_relevancy_follows_the_rule(make_model, frames, monkeypatch):
    model, pixels = pair(make_model, frames, width=128, image_size=16, patch_size=8, text_positions=18)
    pixels = pixels[..., :16, :16]
    recorded = record(model, pixels, IDS)
    target = TARGETS["itm"](model, recorded.fused)
    maps = [*recorded.text, *recorded.vision, *(one for layer in recorded.fusion for one in layer)]
    gradients = torch.autograd.grad(target, maps, retain_graph=True)
    # In the order in which they are computed: picture, caption, fusion.
    computed = [*recorded.vision, *recorded.text, *maps[4:]]
    by_map = {id(one): gradient for one, gradient in zip(maps, gradients, strict=True)}
    for number, one in enumerate(computed):
        direction = torch.randn(one.shape, dtype=one.dtype)
        expected = gradients_by_differences(model, pixels, monkeypatch, number, direction)
        assert (by_map[id(one)] * direction).sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    expected = rule(recorded, gradients)
    found = relevancy(recorded, target)
    for name, numbers in zip(("text", "text_to_image", "image", "image_to_text"), expected, strict=True):
        np.testing.assert_allclose(getattr(found, name).numpy(), numbers, rtol=1e-10, atol=1e-14)
        assert np.abs(np.array(numbers) - np.eye(*np.shape(numbers)) * (name in ("text", "image"))).max() > 1e-6


def test_relevancy_without_unimodal_blocks_and_of_one_layer(make_model):
    """Where nothing was mixed before, the normalised relevancies are the identity, not 0 / 0."""
    model, pixels = pair(make_model, 1, text_layers=0, vision_layers=0, fusion_layers=1)
    recorded = record(model, pixels, IDS)
    target = TARGETS["itm"](model, recorded.fused)
    gradient = torch.autograd.grad(target, recorded.fusion[0].text_to_image, retain_graph=True)[0]
    found = relevancy(recorded, target)
    assert all(one.isfinite().all() for one in found)
    # Only the CLS of the last layer reaches the logit.
    cam = (recorded.fusion[0].text_to_image * gradient)[0].clamp(min=0).mean(0).detach()
    assert cam[0].max() > 0 and not cam[1:].any()
    self_attention = found.text - torch.eye(6, dtype=torch.float64)
    weights = self_attention[0] / self_attention[0].sum() + torch.eye(6, dtype=torch.float64)[0]
    torch.testing.assert_close(found.text_to_image, weights[:, None] * cam[0])


def test_a_target_of_the_text_alone(make_model):
    """The image stream of the last layer does not reach it."""
    model, pixels = pair(make_model, 1)
    recorded = record(model, pixels, IDS)
    found = relevancy(recorded, recorded.fused.text_cls.square().sum())
    assert found.text_to_image[0].max() > 0 and all(one.isfinite().all() for one in found)


def test_words_add_their_tokens(make_model):
    model, pixels = pair(make_model, 3)
    maps = attention_maps(record(model, pixels, IDS))
    words = of_words(maps, [[0], [1, 3], [4]], 3)
    assert words.to_image.shape == words.from_image.shape == (3, 3, 4, 4) and words.from_frames.shape == (3, 3)
    for frame, row, column in [(0, 0, 0), (1, 2, 3), (2, 3, 1)]:
        token = 3 + 16 * frame + 4 * row + column
        assert words.to_image[1, frame, row, column] == maps.text_to_image[1, token] + maps.text_to_image[3, token]
        assert words.from_image[1, frame, row, column] == maps.image_to_text[token, 1] + maps.image_to_text[token, 3]
    assert torch.equal(words.from_frames[2], maps.image_to_text[:3, 4])


def test_what_has_no_maps(make_model):
    model, pixels = pair(make_model, 1, fusion_layers=0)
    with pytest.raises(ValueError, match="fusion_layers 0, expected 1 or more"):
        record(model, pixels, IDS)
    model, pixels = pair(make_model, 1)
    recorded = record(model, pixels, IDS)
    with pytest.raises(ValueError, match=r"target: got shape \(1, 2\), expected one number"):
        relevancy(recorded, model.itm_head(model.pool(*recorded.fused.cls)))
    with torch.no_grad():
        recorded = record(model, pixels, IDS)
    with pytest.raises(ValueError, match="has no graph"):
        relevancy(recorded, TARGETS["itm"](model, recorded.fused))
