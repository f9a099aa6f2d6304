"""The plan of a step and its arithmetic, against what PyTorch counts while the step runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sclkern import ObjectiveConfig, SCLConfig, SCLModel, ops, reference
from sclkern.step import StepConfig, make_plan
from sclkern.step.encoding import encode
from sclkern.step.flops import Counter, describe_plan, format_plan
from sclkern.step.fusion import fuse_views, text_token_positions
from sclkern.step.memory import kept_bytes
from step_testing import losses_of, masks_of

STEPS = [
    StepConfig(),
    StepConfig(absorb="never"),
    StepConfig(share_encodings="none", absorb="never"),
    StepConfig(prune_last_layer=False, absorb="never"),
    StepConfig.published(),
]
WORDS, PADDED, ROWS = 9, 12, 2


def attend_separately(query, key, value, cu_seqlens_q, cu_seqlens_k, *_, **__):
    """Packed attention a sequence at a time: the definition pads, and would be counted with its padding."""
    ends = [zip(cu.tolist(), cu.tolist()[1:], strict=False) for cu in (cu_seqlens_q, cu_seqlens_k)]
    parts = [
        reference.attention(query[None, a:b], key[None, c:d], value[None, c:d])[0]
        for (a, b), (c, d) in zip(*ends, strict=True)
    ]
    return torch.cat(parts)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def close(measured, expected):
    # An absorbed form also multiplies the bias of the queries, one column more.
    assert abs(measured - expected) <= 2e-4 * expected, (measured, expected, measured / expected)


# (recipe, source of negative images, ways of execution, frames)
CASES = [
    *((recipe, negatives, step, frames) for recipe, negatives in (("scl", "dataset"), ("glscl", "in_batch"))
      for step in STEPS for frames in (1, 2)),
    *(((*recipe.split("+"),), "in_batch", step, 1)
      for recipe in ("itm", "mlm", "itc", "mvsc", "mlsc", "mltc", "itm+mlm", "mlm+mvsc", "itc+mlsc")
      for step in (StepConfig(), StepConfig(prune_last_layer=False, absorb="never"))),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "negatives", "step", "frames"), CASES, ids=str)
def test_the_arithmetic_is_what_is_executed(make_batch, monkeypatch, recipe, negatives, step, frames):
    objectives = ObjectiveConfig(recipe=recipe, itm_negatives=negatives)
    # Two heads, so that absorbing costs what it should; one layer more than the pruned one.
    config = SCLConfig.preset("tiny").replace(width=128, vision_layers=1, text_layers=1, max_frames=2)
    model = SCLModel(config, objectives, step).eval().set_backend("eager")
    monkeypatch.setattr(ops, "packed_attention", attend_separately)
    batch = make_batch(ROWS, frames=frames, lengths=[WORDS] * ROWS, width=PADDED, false_image=True, dtype=torch.float32)
    batch["text_tokens"] = ROWS * WORDS
    masks = masks_of(model, batch, 0)
    plan = make_plan(objectives, step)
    parts = Counter(config, objectives, plan, caption_tokens=WORDS, padded_tokens=PADDED, num_frames=frames).parts()
    encodings, views = len(plan.images) + len(plan.texts), len(plan.views)

    positions = text_token_positions(masks, batch["text_mask"].sum(1))
    encoded, flops = counted(lambda: encode(model, plan, batch, masks))
    close(flops, ROWS * sum(part.flops for part in parts[:encodings]))
    read = [encoded.texts[text.name] for text in plan.unimodal_texts]
    read += [encoded.images[image.name] for image in plan.unimodal_images]
    if views:
        fused, flops = counted(lambda: fuse_views(model, plan, encoded, batch, masks, positions))
        close(flops, ROWS * sum(part.flops for part in parts[encodings : encodings + views]))
        read += [tokens for view in (*fused.text.values(), *fused.image.values()) for tokens in view.values()]
    _, flops = counted(lambda: sum(tokens.sum() for tokens in read).backward())
    close(flops, ROWS * sum(part.backward for part in parts[: encodings + views]))
    # The losses add the similarities of their features, which depend on the batch.
    _, flops = counted(lambda: losses_of(model, batch, masks))
    heads = ROWS * sum(part.flops for part in parts)
    assert heads <= flops < 1.03 * heads


def flops_ratio(config, objectives, step):
    """FLOPs of the plan over those of separate passes, without the bytes that ``describe_plan`` finds too."""
    counts = []
    for each, padded in ((step, 13), (StepConfig.published(), config.max_text_len)):
        counter = Counter(config, objectives, make_plan(objectives, each), caption_tokens=13, padded_tokens=padded)
        counts.append(sum(part.total for part in counter.parts()))
    return counts[0] / counts[1], counts[1]


def test_the_base_model_computes_half_of_what_separate_passes_do():
    config = SCLConfig.preset("base")
    dataset, in_batch = (ObjectiveConfig(itm_negatives=name) for name in ("dataset", "in_batch"))
    plain, separate = flops_ratio(config, dataset, StepConfig(absorb="never"))
    assert plain <= 0.52
    absorbed = describe_plan(config, dataset, StepConfig())
    assert absorbed["flops_ratio"] == flops_ratio(config, dataset, StepConfig())[0] <= 0.46
    assert flops_ratio(config, in_batch, StepConfig())[0] < absorbed["flops_ratio"]
    assert absorbed["kept_ratio"] <= 0.6
    # The published code's five passes cost 1262 GFLOP a sample (its heads apart, which see every position).
    assert abs(separate / 1e9 - 1262) < 10


def test_a_gpu_absorbs_into_queries_only_where_the_step_says_so():
    """Without a GPU: the form follows from the type of the device."""
    config, objectives = SCLConfig.preset("base"), ObjectiveConfig(itm_negatives="dataset")

    def flops(device, absorb="auto", backend="auto", dropout=0.1):
        sized, plan = replace(config, dropout=dropout), make_plan(objectives, StepConfig(absorb=absorb))
        sizes = {"caption_tokens": 13, "padded_tokens": 13}
        parts = Counter(sized, objectives, plan, **sizes, device=device, backend=backend).parts()
        return sum(part.total for part in parts)

    never, some, every = (flops("cuda", absorb) for absorb in ("never", "auto", "all"))
    assert every < some < never
    assert flops("cuda", dropout=0.0) == every
    # A CPU has no launches to save.
    assert flops("cpu") == flops("cpu", "all") == every
    assert flops("cpu", "never") == never
    assert {flops(device, backend=name) for device in ("cpu", "cuda") for name in ("sdpa", "flash")} == {never}
    described = describe_plan(config, objectives, StepConfig(), device="cuda")
    assert (described["device"], described["flops"]) == ("cuda", some)
    assert "a sample on cuda: " in format_plan(described)


def test_a_recipe_of_itm_alone_costs_one_view():
    config = SCLConfig.preset("base")

    def total(recipe):
        plan = make_plan(ObjectiveConfig(recipe=recipe), StepConfig())
        counter = Counter(config, ObjectiveConfig(recipe=recipe), plan, caption_tokens=13, padded_tokens=13)
        return counter.parts(), sum(part.total for part in counter.parts())

    parts, flops = total(("itm",))
    assert [part.name for part in parts] == ["image complete", "text complete/itm", "fusion itm", "heads"]
    assert [part.tokens for part in parts] == [325, 13, 338, 0]
    # Most of it is the encoding of the image, which the other views would share.
    assert flops < 0.55 * total("scl")[1]


def test_separate_passes_have_a_ratio_of_one():
    described = describe_plan(SCLConfig.preset("tiny"), ObjectiveConfig(), StepConfig.published(), caption_tokens=9)
    assert described["flops_ratio"] == described["kept_ratio"] == 1


def test_a_plan_can_be_read():
    text = format_plan(describe_plan(SCLConfig.preset("demo"), ObjectiveConfig("glscl"), StepConfig()))
    for word in ("token_masked", "masked_image", "completion", "other rows", "GFLOP", "ratio"):
        assert word in text


def test_the_plan_depends_on_the_recipe_alone():
    objectives = ObjectiveConfig()
    assert make_plan(objectives, StepConfig()) == make_plan(objectives, StepConfig())
    names = [view.name for view in make_plan(objectives, StepConfig()).views]
    assert sorted(names) == ["itm", "masked_image", "masked_text", "mlm"]
    apart = make_plan(objectives, StepConfig(share_encodings="none"))
    assert len(apart.images) == len(apart.texts) == 1 + len(names)


def test_what_is_kept_is_what_autograd_keeps(make_batch):
    """Without fakes, on the path that a CPU takes by eager ops."""
    config = SCLConfig.preset("tiny")
    model = SCLModel(config, ObjectiveConfig(), StepConfig()).train().set_backend("eager")
    batch = make_batch(4, lengths=[9] * 4, dtype=torch.float32)
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch.values())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model({**batch, "text_tokens": 36}, seed=0)
    eager = sum(size for size, _ in kept.values()) / 4
    assert losses.total.requires_grad
    sizes = {"caption_tokens": 9, "padded_tokens": 9}
    kernels = kept_bytes(config, ObjectiveConfig(), StepConfig(), **sizes)
    # The kernels keep less: no probabilities, no sums, no dropout masks.
    assert 0.2 * eager < kernels < eager
    checkpointed = kept_bytes(config, ObjectiveConfig(), StepConfig(checkpoint_blocks=True), **sizes)
    assert checkpointed < 0.4 * kernels
