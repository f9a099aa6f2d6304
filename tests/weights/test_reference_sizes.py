"""Published names and tensors of a model of any size, there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from same_state import assert_states_equal
from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.models import SCLConfig
from sclkern.weights import split_to_reference, to_reference
from sclkern.weights.loading import part_of
from sclkern.weights.names import HEAD_MODULES, reference_names

configs = st.builds(
    SCLConfig,
    width=st.just(64),
    vision_layers=st.integers(0, 2),
    text_layers=st.integers(0, 2),
    fusion_layers=st.integers(0, 2),
    image_size=st.sampled_from([8, 24, 32]),
    patch_size=st.just(8),
    max_frames=st.integers(0, 3),
    vocab_size=st.integers(5, 40),
    max_text_len=st.just(6),
    text_positions=st.integers(8, 12),
    text_types=st.integers(1, 2),
    token_types=st.integers(2, 3),
    mlp_ratio=st.integers(1, 4),
    projection_dim=st.integers(1, 20),
    patch_mask_token=st.booleans(),
    heads=st.sets(st.sampled_from(sorted(HEAD_MODULES))).map(tuple),
    vqa_answers=st.integers(2, 9),
    mask_id=st.just(4),
)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def random_model(config: SCLConfig) -> SCLModel:
    if "nlvr2" in config.heads:
        config = config.replace(token_types=3)
    return SCLModel(config)


@quick
@given(configs)
def test_names_cover_every_parameter_once(config: SCLConfig) -> None:
    names, state = reference_names(config), SCLModel(config).state_dict()
    assert names.keys() == state.keys()
    published = [key for keys in names.values() for key in keys]
    assert len(published) == len(set(published))
    parts = split_to_reference(config, state)
    assert sum(tensor.numel() for tensor in parts.values()) == sum(tensor.numel() for tensor in state.values())


@quick
@given(configs, st.randoms(use_true_random=False), st.sampled_from(["", "model.", "module."]))
def test_round_trip(config: SCLConfig, random, prefix: str) -> None:
    model = random_model(config)
    published = [(prefix + key, tensor) for key, tensor in to_reference(model).items()]
    random.shuffle(published)
    again = SCLModel.from_reference(dict(published))
    assert_states_equal(again.state_dict(), model.state_dict())
    assert set(again.config.heads) == set(model.config.heads)
    assert_states_equal(to_reference(again), to_reference(model))


@quick
@given(configs, st.data())
def test_every_missing_and_extra_tensor_is_reported(config: SCLConfig, data: st.DataObject) -> None:
    model = random_model(config)
    published = to_reference(model)
    # Half of the draws aim at the small optional parts, which follow a rule of their own.
    keys = sorted(published)
    optional = [key for name, keys in reference_names(model.config).items() if part_of(name) for key in keys]
    pool = data.draw(st.sampled_from([keys, optional or keys]))
    gone = data.draw(st.sets(st.sampled_from(pool), max_size=8))
    extra = data.draw(
        st.sets(st.sampled_from([f"{key}{tail}" for key in keys[:9] for tail in ("x", ".y")]), max_size=4)
    )
    damaged = published | {key: torch.ones(1) for key in extra}
    for key in gone:
        del damaged[key]

    names = reference_names(model.config)
    lost = {name for name, keys in names.items() if gone & set(keys)}
    whole_parts = {part_of(name) for name in names} - {None}
    whole_parts -= {part_of(name) for name, keys in names.items() if set(keys) - gone}
    missing = {name for name in lost if part_of(name) not in whole_parts}
    report = SCLModel.from_reference(damaged, config=model.config, strict=False).load_report
    assert set(report.missing) == missing
    assert set(report.unexpected) == extra
    assert report.loaded == len(names) - len(lost)
    assert bool(report.initialised) == bool(lost - missing)
    if missing or extra:
        with pytest.raises(UserError, match="strict=False loads the rest"):
            SCLModel.from_reference(damaged, config=model.config)
    else:
        assert SCLModel.from_reference(damaged, config=model.config).load_report == report
