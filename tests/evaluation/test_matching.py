"""Packed pairs against the fusion encoder pair by pair, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sclkern import SCLConfig, SCLModel
from sclkern.evaluation.matching import EncodedTexts, ImageBatch
from sclkern.models import VisionFeatures

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = np.array([5, 3, 16, 3, 9, 4, 5])


def gallery(frames=1, **changes):
    torch.manual_seed(2)
    config = SCLConfig.preset("tiny").replace(init_std=0.2, max_frames=frames if frames > 1 else 0, **changes)
    model = SCLModel(config).double().eval()
    mask = torch.arange(16) < torch.from_numpy(LENGTHS)[:, None]
    ids = torch.randint(3, 110, (len(LENGTHS), 16)).masked_fill(~mask, config.pad_id)
    size = (3, frames, 3, 32, 32) if frames > 1 else (3, 3, 32, 32)
    return model, model.encode_image(torch.randn(size, dtype=torch.float64)), model.encode_text(ids, mask), mask


CASES = [{}, {"fusion_layers": 1}, {"fusion_layers": 0}, {"frames": 3}, {"frames": 2, "fusion_layers": 1}]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("absorb", "backend"), [("auto", "auto"), ("never", "eager"), ("all", "sdpa")])
def test_pairs_are_what_they_are_alone(case, absorb, backend):
    model, image, text, mask = gallery(**case)
    model.execution.absorb = absorb
    model.set_backend(backend)
    texts = EncodedTexts(text[mask], np.cumsum(LENGTHS) - LENGTHS, LENGTHS)
    # Some pairs in no order of images, one of them twice.
    chosen = np.array([[0, 1], [2, 3], [0, 3], [1, 5], [1, 0], [0, 6], [2, 0], [1, 4], [2, 2], [0, 1]])
    chosen = chosen[np.argsort(LENGTHS[chosen[:, 1]], kind="stable")]
    pooled = ImageBatch(model, image).pooled(texts, chosen[:, 0], chosen[:, 1])
    for (i, t), found in zip(chosen, pooled, strict=True):
        length = LENGTHS[t]
        alone = VisionFeatures(image.tokens[i : i + 1], image.num_frames)
        fused = model.run_fusion(text[t : t + 1, :length], mask[t : t + 1, :length], alone)
        torch.testing.assert_close(found, model.pool(*fused.cls)[0], rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    model, image, text, mask = gallery()
    texts = EncodedTexts(text[mask], np.cumsum(LENGTHS) - LENGTHS, LENGTHS)
    rows = np.array([0, 1, 2])
    whole = ImageBatch(model, image).pooled(texts, rows, np.array([1, 1, 1]))
    changed = image.with_tokens(torch.cat([image.tokens[:2], torch.randn_like(image.tokens[2:])]))
    other = ImageBatch(model, changed).pooled(texts, rows, np.array([1, 1, 1]))
    torch.testing.assert_close(other[:2], whole[:2], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(other[2], whole[2])


@torch.no_grad()
@pytest.mark.parametrize("case", ["image", "video"])
def test_pairs_are_those_of_the_reference_implementation(case):
    golden = load_file(GOLDEN / f"{case}.safetensors")
    of = lambda group: {key.removeprefix(group): x for key, x in golden.items() if key.startswith(group)}  # noqa: E731
    model = SCLModel.from_reference(of("w.")).eval()
    given, mask = of("in."), golden["in.text_mask"].bool()
    image = model.encode_image(given["image" if case == "image" else "video"])
    text = model.encode_text(given["text_ids"], mask)
    lengths = mask.sum(1).numpy()
    texts = EncodedTexts(text[mask], np.cumsum(lengths) - lengths, lengths)
    rows = np.argsort(lengths, kind="stable")
    pooled = ImageBatch(model, image).pooled(texts, rows, rows)
    expected = golden["out.complete.cls_feats"][torch.from_numpy(rows)]
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-4 * float(expected.abs().max().clamp_min(1)))
    if case == "image":
        scores = model.rank_head(pooled)[:, 0]
        torch.testing.assert_close(scores, golden["out.rank_scores"][torch.from_numpy(rows)], rtol=1e-4, atol=1e-4)
