import io

import pytest
import torch
from PIL import Image

from sclkern import SCLConfig, SCLModel
from sclkern.data import open_pairs
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.evaluation.retrieval import evaluate_retrieval


@pytest.fixture
def source(tmp_path):
    captions = [["a cat"], ["a dog", "an animal"], ["a cat"], ["an animal"], ["a red car"], ["a tree"]]
    rows = []
    for i, caption in enumerate(captions):
        stream = io.BytesIO()
        Image.effect_noise((40, 40), 90).convert("RGB").rotate(i).save(stream, "PNG")
        rows.append({"image": stream.getvalue(), "caption": caption, "image_id": str(i), "split": "test"})
    write_pairs(tmp_path / "t.arrow", rows)
    return open_pairs(tmp_path, ["t"])


def evaluate(source, rerank, **options):
    torch.manual_seed(0)
    config = SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047)
    model = SCLModel(config).train()
    tokenizer = CaptionTokenizer.from_pretrained("demo")
    result = evaluate_retrieval(model, source, tokenizer, build_transform("clip_test", 32), rerank=rerank, **options)
    assert model.training
    return result


def test_distinct_captions_are_the_candidates(source):
    result = evaluate(source, rerank=0)
    assert (result.images, result.captions) == (6, 5)
    assert "itm_image_to_text_r1" not in result.recalls
    # Five captions, one or two of them right: the first five hold all.
    assert result.recalls["itc_image_to_text_r5"] == 1.0
    assert result.recalls["chance_text_to_image_r1"] == pytest.approx((2 + 1 + 2 + 1 + 1) / 6 / 5)


def test_batching_changes_nothing(source):
    whole, pieces = evaluate(source, rerank=3, batch_size=64), evaluate(source, rerank=3, batch_size=2)
    assert whole == pieces


class PadsOnTheLeft(CaptionTokenizer):
    """As a tokenizer of another library may do."""

    def __call__(self, *arguments, **options):
        ids, mask = super().__call__(*arguments, **options)
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        return ids.gather(1, order), mask.gather(1, order).long()


def test_captions_may_be_padded_on_the_left(source, monkeypatch):
    expected = evaluate(source, rerank=3)
    monkeypatch.setattr(f"{__name__}.CaptionTokenizer", PadsOnTheLeft)
    assert evaluate(source, rerank=3) == expected


def test_reranking_all_candidates_is_ranking_by_matching(source):
    result = evaluate(source, rerank=6)
    # With every caption a candidate, R@5 of five captions must be 1 whatever the order.
    assert result.recalls["itm_image_to_text_r5"] == 1.0


def test_a_perfect_model_scores_one(source, monkeypatch):
    torch.manual_seed(0)
    model = SCLModel(SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047))
    of_pair = [source.caption(pair) for pair in range(source.num_pairs)]
    distinct = sorted(set(of_pair), key=lambda caption: int(source.pair_group[of_pair.index(caption)]))
    text = torch.eye(len(distinct))
    image = torch.zeros(source.num_images, len(distinct))
    for pair, caption in enumerate(of_pair):
        image[source.pair_image[pair], distinct.index(caption)] = 1
    monkeypatch.setattr(model, "project", lambda *_: (text, image))
    tokenizer = CaptionTokenizer.from_pretrained("demo")
    result = evaluate_retrieval(model, source, tokenizer, build_transform("clip_test", 32), rerank=0)
    assert result.recalls["itc_image_to_text_r1"] == 1.0
    # An image with one caption is nearer to it than an image with two: both are right for "an animal".
    assert result.recalls["itc_text_to_image_r1"] == 1.0
