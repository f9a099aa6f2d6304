import pytest
import yaml

from sclkern.errors import UserError
from sclkern.models import SCLConfig
from sclkern.training.config import batch_difference, build_config, config_keys, load_config, resume_difference


def write(tmp_path, values):
    path = tmp_path / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    "name", ["demo", "pretrain_24gb", "pretrain_base", "pretrain_full", "pretrain_mixed", "pretrain_video", "published"]
)
def test_shipped_configs_load_and_survive_a_round_trip(name, pytestconfig):
    config = load_config(pytestconfig.rootpath / "configs" / f"{name}.yaml")
    assert build_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_overrides_win_over_the_file_and_the_preset(tmp_path):
    path = write(tmp_path, {"model": {"preset": "tiny", "width": 128}, "run": {"max_steps": 5}})
    config = load_config(path, ["model.width=192", "run.seed=7", "data.train_split=null", "optimizer.betas=[0.8, 0.9]"])
    assert config.model == SCLConfig.preset("tiny").replace(width=192)
    assert (config.run.max_steps, config.run.seed) == (5, 7)
    assert config.data.train_split is None and config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"run": {"max_stps": 5}}, [], r"unknown key 'run\.max_stps'; did you mean 'run\.max_steps'\?"),
        ({"objective": {}}, [], r"unknown key 'objective'; did you mean 'objectives'\?"),
        ({}, ["run.qqqqq=1"], r"unknown key 'run\.qqqqq'; known: "),
        ({"model": {"preset": "tiny", "width": 100}}, [], r"model\.width: got 100, expected a positive multiple of 64"),
        ({"model": {"preset": "huge"}}, [], r"preset: got 'huge', expected one of tiny"),
        ({"run": {"max_steps": "many"}}, [], r"run\.max_steps: got 'many'; .*integer"),
        ({"run": {"batch_size": 0}}, [], r"run\.batch_size: got 0, expected 1 or more"),
        ({"objectives": {"recipe": "clip"}}, [], r"objectives\.recipe: got 'clip', expected one of scl, glscl"),
        ({"objectives": {"recipe": ["itm", "clip"]}}, [], r"objectives\.recipe: got 'clip', expected some of itm, mlm"),
        ({"objectives": {"mlm_ratio": 1.5}}, [], r"objectives\.mlm_ratio: got 1\.5, expected 0 <= ratio < 1"),
        ({"weights": {"text": "roberta"}}, [], r"weights\.text, vision: got 'roberta' and None, expected both"),
        ({"run": {"stop_at": 0}}, [], r"run\.stop_at: got 0, expected 1 or more"),
        ({"run": {"seed": -1}}, [], r"run\.seed: got -1, expected 0 or more"),
        ({"data": {"num_workers": -1}}, [], r"data\.num_workers: got -1, expected 0 or more"),
        ({"optimizer": {"betas": [2, 0.9]}}, [], r"optimizer\.betas: got \(2\.0, 0\.9\), expected two numbers"),
        ({"optimizer": {"max_grad_norm": 0}}, [], r"optimizer\.max_grad_norm: got 0\.0, expected a positive number"),
        ({"evaluation": {"batch_size": 0}}, [], r"evaluation\.batch_size: got 0, expected 1 or more"),
        ({"evaluation": {"attention_images": 101}}, [], r"evaluation\.attention_images: got 101, expected 0 to 100"),
        ({"data": {"train_tables": "pairs"}}, [], r"data\.train_tables: got 'pairs'; Input should be a list"),
        ({"model": {"preset": ["a"]}}, [], r"model\.preset: got \['a'\], expected a name"),
        ({"run": 3}, [], r"run: got 3, expected a section"),
        ("- 1\n- 2\n", [], r"got a list, expected sections"),
        ("run: {", [], r"not YAML"),
        ({}, ["max_steps=3"], r"override 'max_steps=3': expected section\.key=value"),
        ({}, ["run.max_steps"], r"override 'run\.max_steps': expected section\.key=value"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, values, overrides, message):
    with pytest.raises(UserError, match=message) as raised:
        load_config(write(tmp_path, values), overrides)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_resuming_may_change_how_often_but_not_what():
    saved = build_config({}).to_dict()
    assert resume_difference(saved, build_config({"run": {"log_every": 3, "device": "cpu"}}).to_dict()) is None
    changed = build_config({"optimizer": {"weight_decay": 0.1}}).to_dict()
    assert resume_difference(saved, changed) == "optimizer.weight_decay was 0.01 and is now 0.1"
    # The best checkpoint so far was chosen by recalls of this re-ranking.
    changed = build_config({"evaluation": {"rerank": 0, "train_images": 3}}).to_dict()
    assert resume_difference(saved, changed) == "evaluation.rerank was 16 and is now 0"


def test_every_key_is_described_with_its_default():
    keys = {key.name: key for key in config_keys()}
    assert keys["run.batch_size"].default == 64 and keys["optimizer.betas"].default == [0.9, 0.98]
    assert keys["data.root"].meaning == 'folder of the data, local or an fsspec URL; "demo" is the embedded one.'
    # An entry that goes on in a second line is one line here.
    assert keys["optimizer.no_decay"].meaning.endswith(
        "decays the temperature and the LayerNorms of CLIP and the projections."
    )
    values = build_config({}).to_dict()
    assert {
        f"{section}.{key}": value for section, of_section in values.items() for key, value in of_section.items()
    } == {key.name: key.default for key in keys.values() if key.name != "model.preset"}


@pytest.mark.parametrize(
    ("world", "rows", "accumulation", "remedy"),
    [
        (1, 8, 8, None),
        (4, 8, 2, None),
        (4, 8, 1, "set run.accumulation=2"),
        (4, 5, 2, "set run.batch_size and run.accumulation to factors of 16"),
        (3, 8, 1, "start a number of processes that divides 64"),
    ],
)
def test_the_batch_of_a_step_stays_the_same(world, rows, accumulation, remedy):
    config = build_config({"run": {"batch_size": rows, "accumulation": accumulation}})
    difference = batch_difference(64, config, world)
    assert difference is None if remedy is None else difference.endswith(f"run.accumulation {accumulation}; {remedy}")
