"""The networks of the tasks against the reference implementation's recorded numbers, and dropout by place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sclkern import SCLConfig
from sclkern.tasks.model import Texts
from sclkern.tasks.ranking import RankingModel
from sclkern.tasks.reasoning import ReasoningModel
from sclkern.tasks.vqav2 import VqaModel

GOLDEN = Path(__file__).parents[1] / "golden" / "image.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN)


def network(kind, recorded, **changes):
    weights = {name[2:]: value for name, value in recorded.items() if name.startswith("w.")}
    return kind.from_reference(weights, patch_mask_token=False, **changes).eval()


def batch(recorded):
    return {
        "image": recorded["in.image"],
        "text_ids": recorded["in.text_ids"],
        "text_mask": recorded["in.text_mask"].bool(),
    }


def close(value, expected):
    limit = 1e-4 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(value.flatten(), expected.flatten(), rtol=0, atol=limit)


def test_visual_question_answering(recorded):
    model = network(VqaModel, recorded, heads=("vqa",), vqa_answers=recorded["out.vqa_logits"].shape[1])
    asked = {**batch(recorded), "targets": recorded["in.vqa_targets"].float()}
    losses = model(asked, seed=0)
    close(losses.total, recorded["loss.vqa_loss"])
    assert set(losses.named()) == {"total", "vqa"}
    close(model._logits(asked), recorded["out.vqa_logits"])
    assert torch.equal(model.predict(asked), recorded["out.vqa_logits"].argmax(1))


def test_reasoning_on_two_pictures(recorded):
    model = network(ReasoningModel, recorded, heads=("nlvr2",), token_types=3)
    pictures = torch.stack([recorded["in.image"], recorded["in.false_image"]], dim=1)
    labels = torch.arange(len(pictures)) % 2
    asked = {**batch(recorded), "image": pictures, "labels": labels}
    losses = model(asked, seed=0)
    close(losses.total, recorded["loss.nlvr2_loss"])
    close(model._logits(asked), recorded["out.nlvr2_logits"])
    assert torch.equal(model.predict(asked), recorded["out.nlvr2_logits"].argmax(1))


def test_ranking(recorded):
    model = network(RankingModel, recorded, heads=("itc", "rank"))
    scores = model.predict(batch(recorded))
    close(scores, recorded["out.rank_scores"])


def test_the_loss_of_ranking_is_that_of_its_definition(make_batch):
    torch.manual_seed(0)
    config = SCLConfig.preset("tiny").replace(heads=("itc", "rank"), patch_mask_token=False, init_std=0.2)
    model = RankingModel(config).double().eval()
    captions = make_batch(rows=6, seed=4)
    # Rows 0 and 1 show the same picture; the second text of row 2 is one of it.
    asked = {**captions, "image": make_batch(rows=3, seed=5)["image"], "image_id": torch.tensor([7, 7, 9])}
    asked["text_image"] = torch.tensor([7, 7, 9, 1, 2, 7])
    text = model.encode_texts(asked["text_ids"], asked["text_mask"])
    image = model.encode_image(asked["image"])
    pairs = [[(i, t) for t in (i, i + 3)] for i in range(3)]
    parts = [
        [model.fuse(Texts(text.tokens[[t]], text.mask[[t]]), image.with_tokens(image.tokens[[i]])) for i, t in row]
        for row in pairs
    ]
    scores = torch.stack([torch.cat([model.rank_head(pair)[:, 0] for pair in row]) for row in parts])
    ranking = -scores.float().log_softmax(1)[:, 0].mean()
    t, v = (x.float() / x.float().norm(dim=1, keepdim=True) for x in model.project(text.tokens[:, 0], image.cls))
    similarity = (v @ t.T / model.contrast_temperature()).exp()
    allowed = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    of_text = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]])
    to_text = [-(similarity[i, i] / (similarity[i] * allowed[i]).sum()).log() for i in range(3)]
    to_image = [-(similarity[i, i] / (similarity[:, i] * of_text[:, i]).sum()).log() for i in range(3)]
    contrast = (sum(to_text) + sum(to_image)) / 6
    losses = model(asked, seed=0)
    torch.testing.assert_close(losses.metrics["ranking_loss"], ranking)
    torch.testing.assert_close(losses.metrics["contrast_loss"], contrast, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, ranking + 0.5 * contrast, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [VqaModel, ReasoningModel, RankingModel])
def test_scores_are_of_float32_in_half_of_the_precision(recorded, kind):
    heads = {VqaModel: ("vqa",), ReasoningModel: ("nlvr2",), RankingModel: ("itc", "rank")}[kind]
    model = network(kind, recorded, heads=heads, vqa_answers=recorded["out.vqa_logits"].shape[1], token_types=3)
    asked = batch(recorded)
    seen = []
    head = getattr(model, f"{heads[-1]}_head")
    head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    if kind is ReasoningModel:
        asked["image"] = torch.stack([recorded["in.image"], recorded["in.false_image"]], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        model.predict(asked)
    assert seen[0].dtype == torch.float32 and not torch.equal(seen[0], seen[0].bfloat16().float())


def test_dropout_follows_from_the_place_of_a_row(make_batch):
    torch.manual_seed(0)
    config = SCLConfig.preset("tiny").replace(heads=("nlvr2",), token_types=3, patch_mask_token=False, dropout=0.3)
    model = ReasoningModel(config).double()
    first, second = make_batch(rows=4, lengths=[7, 5, 9, 9], seed=2), make_batch(rows=4, seed=3)
    whole = {
        **first,
        "image": torch.stack([first["image"], second["image"]], dim=1),
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    whole["place"] = torch.arange(4)

    def part(rows):
        return {name: value[rows] for name, value in whole.items()}

    together = model(whole, seed=5).total
    parts = (model(part([0, 3]), seed=5).total + model(part([1, 2]), seed=5).total) / 2
    torch.testing.assert_close(parts, together)
    assert not torch.equal(model(whole, seed=6).total, together)
