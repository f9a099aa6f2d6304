import pytest
import torch

from sclkern import SCLConfig, SCLModel
from sclkern.training.config import OptimizerConfig
from sclkern.training.optim import build_optimizer, parameter_groups, schedule_factor, set_learning_rate


@pytest.fixture(scope="module")
def model():
    return SCLModel(
        SCLConfig.preset("tiny").replace(heads=("itm", "mlm", "itc", "vqa", "nlvr2", "rank"), token_types=3)
    )


def placed(model, config):
    """Name of each parameter -> (learning rate, weight decay)."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in parameter_groups(model, config) for p in g["params"]}


def test_every_parameter_is_in_one_group(model):
    listed = [id(p) for g in parameter_groups(model, OptimizerConfig()) for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_learning_rates_of_fusion_and_heads(model):
    rates = {n: lr for n, (lr, _) in placed(model, OptimizerConfig(1.0, fusion_factor=3, head_factor=7)).items()}
    expected = {
        "text_transform.weight": 3, "image_pooler.dense.weight": 3, "fusion.text_layers.0.mlp.fc1.bias": 3,
        "mlm_head.decoder.weight": 7, "itm_head.bias": 7, "vqa_head.0.weight": 7, "nlvr2_head.3.bias": 7,
        "text.word.weight": 1, "vision.cls": 1, "text_projection.0.weight": 1, "temperature": 1, "modality.weight": 1,
        "rank_head.weight": 1,
    }  # fmt: skip
    assert {name: rates[name] for name in expected} == expected


def test_nothing_that_normalises_is_decayed(model):
    decayed = {n for n, (_, decay) in placed(model, OptimizerConfig()).items() if decay}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    exempt = {id(p) for m in norms for p in m.parameters()} | {id(model.temperature)}
    expected = {n for n, p in model.named_parameters() if id(p) not in exempt and not n.endswith("bias")}
    assert decayed == expected


def test_the_reference_decays_clip_norms_and_the_temperature(model):
    ours = {n for n, (_, decay) in placed(model, OptimizerConfig()).items() if decay}
    reference = {n for n, (_, decay) in placed(model, OptimizerConfig(no_decay="published")).items() if decay}
    assert ours < reference
    extra = reference - ours
    assert "temperature" in extra and "vision.norm_pre.weight" in extra and "image_projection.1.weight" in extra
    assert not any(name.startswith(("text.", "fusion.", "mlm_head.")) for name in extra)


def test_schedule_rises_then_falls_linearly():
    config = OptimizerConfig(warmup=0.1, end_factor=0.2)
    factors = [schedule_factor(step, 100, config) for step in range(101)]
    assert factors[0] == 0 and factors[5] == 0.5 and factors[10] == 1 and factors[100] == pytest.approx(0.2)
    assert factors[55] == pytest.approx(0.6)


def test_schedule_equals_transformers_polynomial_decay():
    from transformers import get_polynomial_decay_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_polynomial_decay_schedule_with_warmup(optimizer, 10, 100, lr_end=0.0, power=2.0)
    config = OptimizerConfig(warmup=0.1, decay_power=2.0)
    for step in range(100):
        assert schedule_factor(step, 100, config) == pytest.approx(theirs.get_last_lr()[0]), step
        optimizer.step()
        theirs.step()


def test_learning_rate_follows_the_factor(model):
    optimizer = build_optimizer(model, OptimizerConfig(1e-3, fusion_factor=5))
    set_learning_rate(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.5e-3, 2.5e-3}
