import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sclkern import SCLConfig, SCLModel
from sclkern.evaluation.cost import plan_retrieval
from sclkern.evaluation.matching import EncodedTexts, ImageBatch
from sclkern.evaluation.reranking import Reranking


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_the_arithmetic_of_a_pair_is_what_is_computed(frames):
    config = SCLConfig.preset("tiny").replace(
        fusion_layers=3, width=128, image_size=64, max_frames=frames if frames > 1 else 0
    )
    # torch's counter knows no attention of a CPU.
    model = SCLModel(config).eval().set_backend("eager")
    pixels = torch.randn(2, frames, 3, 64, 64) if frames > 1 else torch.randn(2, 3, 64, 64)
    ids, mask = torch.full((4, 6), 5), torch.ones(4, 6, dtype=torch.bool)

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        return result, counter.get_total_flops()

    image, of_images = flops(lambda: model.encode_image(pixels))
    text, of_texts = flops(lambda: model.encode_text(ids, mask))
    batch = ImageBatch(model, image)
    texts = EncodedTexts(text.flatten(0, 1), np.arange(4) * 6, np.full(4, 6))
    rows = np.array([0, 1, 0, 1])
    _, of_pairs = flops(lambda: batch.pooled(texts, rows, np.arange(4)))
    plan = plan_retrieval(config, 2, 4, Reranking(None), text_tokens=6, num_frames=frames)
    assert plan.flops_a_pair == pytest.approx(of_pairs / 4, rel=0.02)
    assert plan.encoding_flops == pytest.approx(of_images + of_texts, rel=0.02)
    if frames == 1:
        _, of_fusion = flops(
            lambda: model.pool(*model.run_fusion(text[:1], mask[:1], image.with_tokens(image.tokens[:1])).cls)
        )
        padded = plan_retrieval(config.replace(max_text_len=6), 2, 4, Reranking(None), text_tokens=6)
        published = of_images / 2 + of_texts / 4 + of_fusion
        assert padded.published_flops_a_pair == pytest.approx(published, rel=0.02)


def test_the_plan_of_coco():
    config = SCLConfig().replace(image_size=384)
    plan = plan_retrieval(config, 5000, 25010, Reranking(None), world_size=8)
    assert plan.pairs == 125_050_000
    # 625 images of 577 tokens, in float32.
    assert plan.image_bytes == 625 * 577 * 768 * 4 and plan.text_bytes == 25010 * 13 * 768 * 4
    assert plan.score_bytes == 2 * 4 * plan.pairs
    assert plan.seconds(1e14) == plan.flops / 8e14
    assert "5,000 images x 25,010 texts: 125,050,000 pairs on 8 ranks" in plan.describe(1e14)
    candidates = plan_retrieval(config, 5000, 25010, Reranking(256))
    assert candidates.pairs == 256 * 30_010 and candidates.flops_a_pair == plan.flops_a_pair
    assert plan_retrieval(config, 5000, 25010).image_bytes == 0
