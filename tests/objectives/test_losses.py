from __future__ import annotations

import math

import pytest
import torch

from sclkern import objectives as L
from sclkern import ops

TEMPERATURE = 0.3


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def log_softmax_at(row, index):
    top = max(row)
    return row[index] - top - math.log(sum(math.exp(x - top) for x in row))


def info_nce(recovered, complete, temperature, both=True):
    """Mean cross-entropy of cosine similarities, in Python floats."""
    recovered, complete = recovered.tolist(), complete.tolist()
    rows = range(len(recovered))
    similarity = [[cosine(r, c) / temperature for c in complete] for r in recovered]
    loss = -sum(log_softmax_at(similarity[i], i) for i in rows)
    if both:
        loss -= sum(log_softmax_at([similarity[i][j] for i in rows], j) for j in rows)
    return loss / len(recovered)


def features(*shape):
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(2))


def assert_equals(loss, expected):
    torch.testing.assert_close(loss.item(), expected, rtol=1e-9, atol=1e-12)


def test_image_text_matching_is_the_mean_negative_log_likelihood():
    logits, labels = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    expected = -sum(log_softmax_at(row, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)) / 5
    assert_equals(L.image_text_matching(logits, labels), expected)


def identity(hidden):
    """A decoder whose logits are what it reads."""
    return torch.eye(hidden.shape[-1], dtype=hidden.dtype), torch.zeros(hidden.shape[-1], dtype=hidden.dtype)


@pytest.mark.parametrize("empty", ["zero", "published"])
def test_masked_language_modeling_is_the_mean_over_targets(empty):
    logits = torch.randn(2, 4, 7, dtype=torch.float64)
    labels = torch.tensor([[-100, 3, -100, 0], [-100, -100, 6, -100]])
    expected = -sum(log_softmax_at(logits[i, j].tolist(), int(labels[i, j])) for i, j in ((0, 1), (0, 3), (1, 2))) / 3
    loss, hits = L.masked_language_modeling(logits, *identity(logits), labels, empty=empty)
    assert_equals(loss, expected)
    assert hits == sum(int(logits[i, j].argmax() == labels[i, j]) for i, j in ((0, 1), (0, 3), (1, 2)))


def test_masked_language_modeling_without_targets_is_zero_or_nan_as_chosen():
    logits, labels = torch.randn(2, 4, 7, requires_grad=True), torch.full((2, 4), -100)
    loss, hits = L.masked_language_modeling(logits, *identity(logits), labels)
    loss.backward()
    assert hits == 0
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    assert L.masked_language_modeling(logits, *identity(logits), labels, empty="published")[0].isnan()


def test_image_text_contrast_sums_both_directions():
    image, text = features(5, 4)
    loss = L.image_text_contrast(image, text, torch.tensor(0.07, dtype=torch.float64))
    assert_equals(loss, info_nce(image, text, 0.07))


def test_other_pairs_of_the_same_image_are_no_negatives():
    recovered, complete = features(4, 2, 5)
    same, options = torch.tensor([3, 1, 3, 2]), {"temperature": TEMPERATURE}
    # The two captions of image 3 never meet: each loss is that of the others, with one of them.
    parts = [[0, 1, 3], [2, 1, 3]]

    def average(loss):
        """Of rows 0 and 2, each from its part; of rows 1 and 3, which see all, from the whole."""
        per_row = [loss(recovered[part], complete[part], reduction="none") for part in parts]
        whole = loss(recovered, complete, reduction="none")
        return (per_row[0][..., 0] + per_row[1][..., 0] + whole[..., 1] + whole[..., 3]).mean() / 4

    def of_cls(recovered, complete, **rest):
        return ops.completion_loss(recovered[:, 0], complete[:, 0], **options, **rest)

    def of_frames(recovered, complete, **rest):
        return ops.completion_loss(recovered.transpose(0, 1), complete.transpose(0, 1), **options, **rest)

    text = L.masked_language_semantic_completion(recovered[:, 0], complete[:, 0], same=same, **options)
    assert_equals(text, average(of_cls).item())
    contrast = L.image_text_contrast(
        recovered[:, 0], complete[:, 0], torch.tensor(TEMPERATURE, dtype=torch.float64), same=same
    )
    assert_equals(contrast, average(of_cls).item())
    image = L.masked_vision_semantic_completion(recovered, complete, same=same, **options)
    assert_equals(image, average(of_frames).item())


def test_the_published_norm_leaves_the_same_image_out_too():
    recovered, complete = features(4, 3, 5)
    options = {"temperature": TEMPERATURE, "frame_norm": "published"}
    without = L.masked_vision_semantic_completion(recovered, complete, **options)
    different = L.masked_vision_semantic_completion(recovered, complete, same=torch.arange(4), **options)
    assert_equals(different, without.item())
    alone = L.masked_vision_semantic_completion(recovered, complete, same=torch.zeros(4).long(), **options)
    alone.backward()
    assert alone.item() == 0 and (recovered.grad == 0).all()
    # A pair that meets no other pair of its image has the loss of its rows alone.
    both = L.masked_vision_semantic_completion(recovered, complete, same=torch.tensor([0, 0, 1, 1]), **options)
    assert 0 < both < without


DIRECTIONS = [("both", True), ("published", True), ("recovered_to_complete", False)]


@pytest.mark.parametrize("directions, both", DIRECTIONS)
def test_vision_completion_contrasts_each_frame_separately(directions, both):
    recovered, complete = features(4, 3, 5)
    loss = L.masked_vision_semantic_completion(recovered, complete, temperature=TEMPERATURE, directions=directions)
    frames = [info_nce(recovered[:, f], complete[:, f], TEMPERATURE, both) for f in range(3)]
    assert_equals(loss, sum(frames) / 3)


@pytest.mark.parametrize("directions, both", DIRECTIONS)
def test_vision_completion_normalises_over_frames_as_published(directions, both):
    recovered, complete = features(4, 3, 5)
    loss = L.masked_vision_semantic_completion(
        recovered, complete, temperature=TEMPERATURE, directions=directions, frame_norm="published"
    )
    # compute_scl_video: x / norm(x, dim=1)[:, None] with x (B, F, D), then dot products frame by frame.
    r, c = (x.detach() / x.detach().norm(dim=1)[:, None] for x in (recovered, complete))
    expected = 0.0
    for f in range(3):
        similarity = (r[:, f] @ c[:, f].T / TEMPERATURE).tolist()
        expected -= sum(log_softmax_at(similarity[i], i) for i in range(4)) / 12
        if both:
            expected -= sum(log_softmax_at([row[j] for row in similarity], j) for j in range(4)) / 12
    assert_equals(loss, expected)


@pytest.mark.parametrize("directions, both", DIRECTIONS)
def test_language_completion_contrasts_the_batch(directions, both):
    recovered, complete = features(6, 5)
    loss = L.masked_language_semantic_completion(recovered, complete, temperature=TEMPERATURE, directions=directions)
    assert_equals(loss, info_nce(recovered, complete, TEMPERATURE, both))


@pytest.mark.parametrize("negatives", ["all", "published"])
@pytest.mark.parametrize("directions, both", DIRECTIONS)
def test_token_completion_contrasts_the_valid_tokens_of_the_batch(directions, both, negatives):
    recovered, complete = features(3, 4, 5)
    valid = torch.tensor([[True, True, False, False], [True] * 4, [False, True, False, False]])
    loss = L.masked_local_token_completion(
        recovered, complete, valid, temperature=TEMPERATURE, directions=directions, negatives=negatives
    )
    assert_equals(loss, info_nce(recovered[valid], complete[valid], TEMPERATURE, both))


def test_token_completion_without_tokens_is_zero_or_nan_as_chosen():
    recovered, complete = features(3, 4, 5)
    valid = torch.zeros(3, 4, dtype=torch.bool)
    loss = L.masked_local_token_completion(recovered, complete, valid)
    loss.backward()
    assert loss.item() == 0
    assert (recovered.grad == 0).all()
    assert L.masked_local_token_completion(recovered, complete, valid, empty="published").isnan()


def test_token_completion_takes_room_for_no_token_at_all():
    recovered, complete = features(3, 0, 5)
    loss = L.masked_local_token_completion(recovered, complete, torch.zeros(3, 0, dtype=torch.bool))
    assert loss.item() == 0


@pytest.mark.parametrize("options", [{}, {"frame_norm": "published"}])
def test_vision_targets_get_no_gradient(options):
    recovered, complete = features(4, 3, 5)
    L.masked_vision_semantic_completion(recovered, complete, **options).backward()
    assert complete.grad is None
    assert recovered.grad.abs().sum() > 0


def test_language_and_token_targets_get_no_gradient():
    recovered, complete = features(4, 3)
    L.masked_language_semantic_completion(recovered, complete, temperature=TEMPERATURE).backward()
    tokens, whole_tokens = features(2, 4, 3)
    valid = torch.ones(2, 4, dtype=torch.bool)
    L.masked_local_token_completion(tokens, whole_tokens, valid, temperature=TEMPERATURE).backward()
    assert complete.grad is None
    assert whole_tokens.grad is None
    assert recovered.grad.abs().sum() > 0
    assert tokens.grad.abs().sum() > 0


def test_both_sides_of_the_image_text_contrast_and_its_temperature_learn():
    image, text = features(5, 4)
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    L.image_text_contrast(image, text, temperature).backward()
    for name, leaf in (("image", image), ("text", text), ("temperature", temperature)):
        assert leaf.grad.abs().sum() > 0, name


def test_visual_question_answering_sums_over_answers_and_averages_over_questions():
    logits, targets = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    expected = 0.0
    for x, t in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        chance = 1 / (1 + math.exp(-x))
        expected -= (t * math.log(chance) + (1 - t) * math.log(1 - chance)) / 3
    assert_equals(L.visual_question_answering(logits, targets), expected)


def test_visual_reasoning_is_the_mean_negative_log_likelihood():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    assert_equals(L.visual_reasoning(logits, torch.tensor([1, 0])), (math.log(4 / 3) + math.log(2)) / 2)


def low_precision_cases(dtype):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, 3, 5, generator=generator).to(dtype) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 0])
    valid = torch.ones(4, 3, dtype=torch.bool)
    return {
        "itm": (lambda x, y: L.image_text_matching(x[:, 0, :2], labels.clamp_max(1)), a, b),
        "mlm": (lambda x, y: L.masked_language_modeling(x[:, 0], *identity(x), labels)[0], a, b),
        "itc": (lambda x, y: L.image_text_contrast(x[:, 0], y[:, 0], torch.tensor(0.07)), a, b),
        "mvsc": (lambda x, y: L.masked_vision_semantic_completion(x, y), a, b),
        "mlsc": (lambda x, y: L.masked_language_semantic_completion(x[:, 0], y[:, 0]), a, b),
        "mltc": (lambda x, y: L.masked_local_token_completion(x, y, valid), a, b),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["itm", "mlm", "itc", "mvsc", "mlsc", "mltc"])
def test_half_precision_features_give_a_float32_loss_of_their_exact_values(name, dtype):
    loss, a, b = low_precision_cases(dtype)[name]
    half = loss(a, b)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), loss(a.double(), b.double()).double(), rtol=1e-5, atol=1e-6)
