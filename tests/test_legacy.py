"""Files written before the option value "reference" became "published"."""

from __future__ import annotations

import copy

from sclkern.legacy import translate_config
from sclkern.training.config import load_config, resume_difference
from tiny_run import overrides

OLD = {
    "objectives": {
        "recipe": "glscl", "negatives": "reference", "gather": "reference", "directions": "reference",
        "text_mask": "reference", "mlm_mask": "reference", "itm_negatives": "reference", "frame_norm": "reference",
        "itc_temperature": "reference", "empty_selections": "reference", "temperature": 0.03,
        "itc_temperature_range": [0.01, 0.5], "itc_weight": 0.5,
    },
    "optimizer": {"learning_rate": 2e-5, "no_decay": "reference"},
    "weights": {"pretrained": None, "reference": "runs/scl.ckpt", "text": "reference"},
    "run": {"output_dir": "reference", "max_steps": 5},
}  # fmt: skip


def test_the_old_value_is_translated_where_an_option_had_it():
    translated = translate_config(OLD)
    assert set(translated) == set(OLD)
    choices = {
        key: value for key, value in translated["objectives"].items() if OLD["objectives"].get(key) == "reference"
    }
    assert len(choices) == 9
    assert set(choices.values()) == {"published"}
    assert translated["objectives"]["itc_temperature_range"] == [0.01, 0.5]
    assert translated["optimizer"] == {"learning_rate": 2e-5, "no_decay": "published"}


def test_runs_from_before_had_pairs_of_the_same_image_as_negatives():
    assert translate_config(OLD)["objectives"]["same_image"] == "published"
    of_a_user = {"objectives": {"recipe": "glscl", "negatives": "published"}}
    assert translate_config(of_a_user) == of_a_user
    given = {"objectives": OLD["objectives"] | {"same_image": "ignore"}}
    assert translate_config(given)["objectives"]["same_image"] == "ignore"


def test_names_that_a_user_chose_stay():
    translated = translate_config(OLD)
    assert translated["weights"] == OLD["weights"]
    assert translated["run"] == OLD["run"]


def test_the_given_values_stay_and_todays_values_pass_through():
    before = copy.deepcopy(OLD)
    today = translate_config(OLD)
    assert before == OLD
    assert translate_config(today) == today


def test_what_is_no_section_is_left_for_the_reader_to_refuse():
    assert translate_config({"model": None, "run": "fast", "objectives": ["reference"]}) == {
        "model": None,
        "run": "fast",
        "objectives": ["reference"],
    }


CHOICES = [name for name, value in OLD["objectives"].items() if value == "reference"]


def with_old_values(config):
    """Sections of a configuration as version 12e03c6 wrote them."""
    values = config.to_dict()
    for name in CHOICES:
        values["objectives"][name] = "reference"
    values["optimizer"]["no_decay"] = "reference"
    return values


def test_an_override_may_have_the_old_value():
    config = load_config(None, ["objectives.gather=reference", "optimizer.no_decay=reference"])
    assert (config.objectives.gather, config.optimizer.no_decay) == ("published", "published")


def test_a_checkpoint_with_old_values_is_still_compared(tmp_path):
    config = load_config(None, overrides(tmp_path / "run", objectives__gather="exact"))
    assert resume_difference(with_old_values(config), config.to_dict()) == (
        "objectives.negatives was 'published' and is now 'all'"
    )
