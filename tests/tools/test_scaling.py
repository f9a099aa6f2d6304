"""Scale on paper, against numbers counted by hand."""

from dataclasses import replace

import pytest

from sclkern import ObjectiveConfig, SCLConfig, UserError
from sclkern.step import StepConfig
from sclkern.step.memory import parameter_bytes
from sclkern.tools.scaling import LATENCY, Calculator, Collective, describe_scale, format_scale, step_collectives
from sclkern.training.config import PretrainConfig
from sclkern.training.sections import RunConfig

TINY = SCLConfig.preset("tiny")


def config_of(**run):
    return PretrainConfig(model=TINY, run=RunConfig(**{"batch_size": 8, "accumulation": 4, **run}))


def by_name(collectives):
    return {one.name: one for one in collectives}


def test_a_collective_sends_what_a_ring_sends_and_waits_for_the_latency():
    reduced = Collective("gradients", "all_reduce", 800, 1)
    assert reduced.sent(8) == 1400  # twice seven eighths
    assert reduced.seconds(8, 100.0) == 14 + 6 * LATENCY
    gathered = Collective("features", "all_gather", 800, 3)
    assert gathered.sent(8) == 2100
    assert gathered.seconds(8, 100.0) == 21 + 9 * LATENCY
    assert Collective("alone", "all_reduce", 800, 1).seconds(1, 100.0) == 0


def test_the_exchanges_of_a_step():
    weights = parameter_bytes(TINY)
    found = by_name(step_collectives(config_of(), 2))
    assert found["gradients"] == Collective("gradients", "all_reduce", weights.total, 1, "backward")
    # Two sets of (8, 32) and (8, 64) float32 from each of two ranks, in every micro-batch.
    assert found["features of ITC"] == Collective("features of ITC", "all_gather", 2 * 2 * 8 * 32 * 4, 4)
    assert found["features of MVSC"] == Collective("features of MVSC", "all_gather", 2 * 2 * 8 * 64 * 4, 4)
    # Loss, two log-sum-exps, and for a temperature that is learnt two sums.
    assert found["losses and LSE of ITC"].bytes == 2 * 8 * 5 * 4
    assert found["losses and LSE of MLSC"].bytes == 2 * 8 * 3 * 4
    cached = by_name(step_collectives(config_of(contrastive_batch=64), 2))
    assert cached["features of MLSC"] == Collective("features of MLSC", "all_gather", 2 * 2 * 32 * 64 * 4, 1)
    half = by_name(step_collectives(config_of(precision="bfloat16"), 2))
    assert half["features of ITC"].bytes == found["features of ITC"].bytes / 2
    # Under FSDP every pass gathers the weights, the backward those of blocks alone; gradients are scattered once.
    sharded = by_name(step_collectives(config_of(parallel="fsdp", contrastive_batch=64), 2))
    assert sharded["weights for the forward"].times == 8 and sharded["weights for the backward"].times == 4
    assert sharded["weights for the backward"].bytes == weights.total - weights.outside
    assert sharded["gradients"] == Collective("gradients", "reduce_scatter", weights.total, 1, "backward")


def test_published_negatives_are_not_gathered():
    config = replace(config_of(), objectives=ObjectiveConfig("glscl", negatives="published"))
    names = by_name(step_collectives(config, 2))
    assert not {"features of MLSC", "features of MLTC of patches"} & set(names)
    assert {"features of MVSC", "places of MLTC of tokens"} <= set(names)
    apart = replace(config_of(), objectives=ObjectiveConfig(gather="published"))
    assert "features of MLSC" in by_name(step_collectives(apart, 2))


def test_efficiency_is_what_arithmetic_does_not_hide():
    # Larger than a bucket of DDP.
    wide = replace(config_of(), model=TINY.replace(width=512))
    calculator = Calculator(wide, 1e9, rate=1e10)
    scale = calculator.at(4)
    assert (scale.batch_size, scale.accumulation) == (8, 1)
    exposed = scale.communication_seconds * (1 - scale.hidden)
    assert scale.efficiency == pytest.approx(scale.compute_seconds / (scale.compute_seconds + exposed))
    assert scale.pairs_per_second == pytest.approx(32 / (scale.compute_seconds + exposed))
    assert 0 < scale.hidden < 1
    alone = calculator.at(1)
    assert alone.efficiency == 1 and alone.moved_bytes == 0 and alone.accumulation == 4
    # A faster link, and more pairs, help.
    assert calculator.at(4, link=1e7).efficiency < scale.efficiency < calculator.at(4, pairs=64).efficiency
    assert calculator.at(32).batch_size == 1
    again = Calculator(replace(wide, step=StepConfig(checkpoint_blocks=True)), 1e9, rate=1e10)
    assert 1.3 < again.at(1).compute_seconds / alone.compute_seconds < 1.34
    assert calculator.at(4, link=calculator.least_link(4)).efficiency == pytest.approx(0.9, abs=1e-6)
    assert calculator.at(4, pairs=calculator.least_pairs(4)).efficiency >= 0.9


def test_mistakes_are_named():
    with pytest.raises(UserError, match="--gpus: got 64, expected at most 32, the pairs of a step"):
        Calculator(config_of(), 1e9).at(64)
    with pytest.raises(UserError, match="link: got 0, expected a positive number"):
        Calculator(config_of(), 0.0)


def test_a_scale_can_be_read():
    described = describe_scale(Calculator(config_of(), 5e10), [2, 4])
    text = format_scale(described)
    for word in ("DDP, 50 GB/s", "efficiency", "8 x 1", "features of MVSC", "all-reduce", "of 4 GPUs"):
        assert word in text
    assert [scale["gpus"] for scale in described["scales"]] == [2, 4]
