"""``sclkern configs``, and what ``--config`` may name."""

import re
from pathlib import Path

import pytest

from sclkern.cli import main
from sclkern.cli.config_files import find_config, load, shipped_configs
from sclkern.cli.configs import format_keys, summary
from sclkern.objectives import ObjectiveConfig
from sclkern.step import StepConfig
from sclkern.training.config import PretrainConfig, config_keys

ROOT = Path(__file__).parents[2]


def test_every_shipped_configuration_is_listed_with_its_purpose_and_loads(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_configs())
    assert {
        "demo",
        "pretrain_24gb",
        "pretrain_base",
        "pretrain_full",
        "pretrain_mixed",
        "pretrain_video",
        "published",
    } == set(shipped_configs())
    for line, (name, file) in zip(lines, shipped_configs().items(), strict=True):
        assert file.read_text().startswith("# ") and line.endswith(summary(file)) and len(summary(file)) > 20
        assert isinstance(load(name, []), PretrainConfig)


def test_published_takes_every_option_of_the_published_code():
    config = load("published", [])
    assert config.objectives == ObjectiveConfig.published("glscl")
    assert config.step == StepConfig.published() and config.optimizer.no_decay == "published"


def test_a_configuration_is_printed_by_name(capsys):
    assert main(["configs", "demo"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "demo.yaml").read_text()


def test_names_files_and_paths_are_distinguished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("demo") == shipped_configs()["demo"]
    (tmp_path / "demo").mkdir()
    assert find_config("demo") == shipped_configs()["demo"]  # a folder is no configuration
    (tmp_path / "mine.yaml").write_text("run: {seed: 3}")
    assert load("mine.yaml", []).run.seed == load(str(tmp_path / "mine.yaml"), []).run.seed == 3
    (tmp_path / "pretrain_base").write_text("run: {seed: 4}")
    assert load("pretrain_base", []).run.seed == 4
    assert load("./pretrain_base", ["run.seed=5"]).run.seed == 5


@pytest.mark.parametrize(("value", "message"), [
    ("pretrain_bas", "--config: got 'pretrain_bas', expected a file or one of demo, pretrain_24gb, pretrain_base"),
    ("configs/none.yaml", "configs/none.yaml: No such file or directory"),
])  # fmt: skip
def test_an_unknown_configuration_is_a_mistake_of_the_user(value, message, capsys):
    assert main(["plan", "--config", value]) == 2
    assert message in capsys.readouterr().err


def test_keys_are_printed_with_default_and_meaning(capsys):
    assert main(["configs", "--keys"]) == 0
    text = capsys.readouterr().out
    for key in config_keys():
        assert f"\n  {key.name} = " in text
    for line in (
        "  model.preset = null\n      name of a size (tiny, demo, base, base_video)",
        "  model.heads = [itm, mlm, itc]",
        "  run.precision = float32",
        "  data.train_split = train",
        "  optimizer.learning_rate = 2e-05",
    ):
        assert line in text, line
    assert max(map(len, text.splitlines())) <= 120
    assert main(["configs", "demo", "--keys"]) == 2


def test_printed_defaults_are_overrides_that_change_nothing():
    printed = re.findall(r"^  (\w+\.\w+) = (.*)$", format_keys(config_keys()), re.M)
    assert len(printed) == len(config_keys())
    assert load(None, [f"{name}={value}" for name, value in printed if name != "model.preset"]) == load(None, [])


def test_every_key_has_a_meaning():
    assert [key.name for key in config_keys() if len(key.meaning) < 10] == []
