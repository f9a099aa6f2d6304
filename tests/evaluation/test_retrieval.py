import io
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from sclkern import SCLConfig, SCLModel
from sclkern.data import open_pairs
from sclkern.data.sources.arrow import write_pairs
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform, normalize_images
from sclkern.errors import UserError
from sclkern.evaluation import retrieval
from sclkern.evaluation.reranking import Reranking
from sclkern.evaluation.retrieval import evaluate_retrieval
from sclkern.evaluation.room import Room

CAPTIONS = [["a cat"], ["a dog", "an animal"], ["a cat"], ["an animal"], ["a red car"], ["a tree"]]
# No two are equal, so that no scores are.
DIFFERENT = [["a cat"], ["a dog", "an animal"], ["two cats on a mat"], ["a bird", "a nest", "a tree"], ["a red car"]]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path, CAPTIONS)


def write(tmp_path, captions):
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
    of_pair = [source.caption(pair) for pair in range(source.num_pairs)]
    distinct = sorted(set(of_pair), key=lambda caption: int(source.pair_group[of_pair.index(caption)]))
    perfect = torch.zeros(source.num_images, len(distinct))
    for pair, caption in enumerate(of_pair):
        perfect[source.pair_image[pair], distinct.index(caption)] = 1
    monkeypatch.setattr(retrieval, "similarities", lambda *_: perfect)
    result = evaluate(source, rerank=0)
    assert {value for key, value in result.recalls.items() if key.startswith("itc") and "r1" in key} == {1.0}
    assert result.method == "itc" and result.sum == 6 and result.ranks["itc_text_to_image_mean_rank"] == 1


def naive(source, model, captions, of_image, score, candidates=None):
    """The recalls and ranks of a model, pair by pair, by sorting: scores have no ties."""
    tokenizer, transform = CaptionTokenizer.from_pretrained("demo"), build_transform("clip_test", 32)
    images = [model.encode_image(normalize_images(transform(source.image(i))[None])) for i in range(source.num_images)]
    scores, contrast = torch.zeros(2, len(images), len(captions), dtype=torch.float64).unbind()
    for column, caption in enumerate(captions):
        ids, mask = tokenizer([caption], 16)
        text = model.encode_text(ids, mask)
        for row, image in enumerate(images):
            projected = [torch.nn.functional.normalize(x, dim=-1) for x in model.project(text[:, 0], image.cls)]
            contrast[row, column] = (projected[0] * projected[1]).sum()
            pooled = model.pool(*model.run_fusion(text, mask, image).cls)
            no, yes = model.itm_head(pooled)[0]
            of_head = {"log_odds": yes - no, "logit": yes, "logit+similarity": yes + contrast[row, column]}
            scores[row, column] = of_head[score] if score in of_head else model.rank_head(pooled)[0, 0]
    found = {}
    for direction, own, other, right in (
        ("image_to_text", scores, contrast, of_image), ("text_to_image", scores.T, contrast.T, np.array(of_image).T)
    ):  # fmt: skip
        ranks = []
        for query in range(len(own)):
            order = other[query].argsort(descending=True).tolist()
            if candidates != 0:
                first = order[:candidates]
                order = sorted(first, key=lambda c: -own[query, c].item()) + order[len(first) :]
            ranks.append(next(place for place, c in enumerate(order, 1) if right[query][c]))
        found |= {f"{direction}_r{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 2, 5, 10)}
        found |= {f"{direction}_mean_rank": float(Fraction(sum(ranks), len(ranks)))}
        found |= {f"{direction}_median_rank": statistics.median(ranks)}
    return found


@pytest.mark.parametrize(
    ("score", "candidates", "distinct"),
    [
        ("log_odds", 2, True),
        ("logit", 3, False),
        ("logit+similarity", 4, True),
        ("rank", None, False),
        ("logit", None, True),
    ],
)
def test_the_recalls_are_those_of_pairs_one_by_one(tmp_path, score, candidates, distinct):
    source = write(tmp_path, CAPTIONS if distinct else DIFFERENT)
    torch.manual_seed(5)
    config = SCLConfig.preset("tiny").replace(
        vocab_size=2048, mask_id=2047, heads=("itm", "itc", "rank"), init_std=0.3, dropout=0.0
    )
    model = SCLModel(config).double().eval()
    of_pair = [source.caption(pair) for pair in range(source.num_pairs)]
    captions = list(dict.fromkeys(of_pair)) if distinct else of_pair
    right = [
        [any(source.pair_image[p] == i and (of_pair[p] == c if distinct else p == n) for p in range(len(of_pair)))
         for n, c in enumerate(captions)]
        for i in range(source.num_images)
    ]  # fmt: skip
    with torch.no_grad():
        expected = naive(source, model, captions, right, score, candidates)
    tokenizer, transform = CaptionTokenizer.from_pretrained("demo"), Double(32)
    found = evaluate_retrieval(
        model, source, tokenizer, transform, batch_size=4, ks=(2,), rerank=Reranking(candidates, score),
        distinct_captions=distinct,
    )  # fmt: skip
    method = "rank" if score == "rank" else "itm"
    assert found.captions == len(captions) and found.method == method
    values = {**found.recalls, **found.ranks}
    assert {key: values[f"{method}_{key}"] for key in expected} == expected


class Double:
    """A transform to normalised float64."""

    def __init__(self, size):
        self.transform = build_transform("clip_test", size)

    def __call__(self, image):
        return normalize_images(self.transform(image)).double()


def test_features_in_files_give_the_same(source):
    room = Room(memory=0)
    assert evaluate(source, rerank=3, room=room) == evaluate(source, rerank=3)
    # 6 images of 17 tokens of 64 channels, and 6 x 5 similarities.
    assert room.taken == {"device": 0, "memory": 0, "file": 4 * (6 * 17 * 64 + 6 * 5)}


def test_no_tokens_are_kept_without_re_ranking(source):
    room = Room(memory=10**6)
    evaluate(source, rerank=0, room=room)
    assert room.taken == {"device": 0, "memory": 4 * 6 * 5, "file": 0}


def test_half_precision_scores_in_float32(source):
    assert (
        evaluate(source, rerank=3, precision=torch.bfloat16).recalls.keys() == evaluate(source, rerank=3).recalls.keys()
    )


def test_a_constant_head_gives_chance(source):
    config = SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047)
    model = SCLModel(config)
    for parameter in model.itm_head.parameters():
        parameter.data.zero_()
    tokenizer = CaptionTokenizer.from_pretrained("demo")
    options = {"rerank": Reranking(None), "distinct_captions": False}
    found = evaluate_retrieval(model, source, tokenizer, build_transform("clip_test", 32), **options)
    chance = {key.removeprefix("chance"): value for key, value in found.recalls.items() if key.startswith("chance")}
    assert {key.removeprefix("itm"): x for key, x in found.recalls.items() if key.startswith("itm")} == chance


def test_a_model_without_contrast_scores_all_pairs(source):
    model = SCLModel(SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047, heads=("itm",)))
    arguments = model, source, CaptionTokenizer.from_pretrained("demo"), build_transform("clip_test", 32)
    assert evaluate_retrieval(*arguments, rerank=Reranking(None)).method == "itm"
    with pytest.raises(UserError, match=r"rerank: .* needs \['itc'\] too; without 'itc' take Reranking"):
        evaluate_retrieval(*arguments, rerank=3)
    with pytest.raises(UserError, match=r"needs \['itc', 'rank'\]"):
        evaluate_retrieval(*arguments, rerank=Reranking(3, "rank"))


class Clips:
    """A source of clips of five frames each, of the pictures of another source."""

    def __init__(self, source):
        self.source = source

    def __getattr__(self, name):
        return getattr(self.source, name)

    def frames(self, image, choose):
        if image == 2:
            raise ValueError("the clip has no frame")
        return [self.source.image(image).rotate(20 * number) for number in choose(5)]


def test_clips_are_retrieved_by_their_frames(source):
    seen = []
    model = SCLModel(SCLConfig.preset("tiny").replace(vocab_size=2048, mask_id=2047, max_frames=4))
    arguments = model, Clips(source), CaptionTokenizer.from_pretrained("demo"), build_transform("clip_test", 32)
    choose = lambda count: seen.append(count) or [0, 2, 4]  # noqa: E731
    found = evaluate_retrieval(*arguments, rerank=Reranking(2), choose_frames=choose, ks=(50,))
    assert found.images == 5 and seen == [5] * 5
    assert found.recalls["itm_text_to_image_r50"] == 1 and found.method == "itm"


@pytest.mark.parametrize("wrong", [{"candidates": 0}, {"score": "itm"}])
def test_wrong_rerankings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}: got"):
        Reranking(**wrong)
