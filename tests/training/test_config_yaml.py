"""YAML is read as it is written, or refused."""

import math

import hypothesis
import pytest
from hypothesis import strategies

from sclkern.errors import UserError
from sclkern.training.config import load_config
from sclkern.training.config_yaml import read_value, read_yaml, write_yaml


@pytest.mark.parametrize(
    "text", ["yes", "No", "on", "OFF", "y", "1_000", "1:30", "2024-01-02", "=", "tRue", "none", "5e", "runs/1e-4", "0x"]
)
def test_a_word_is_text(text):
    assert read_yaml(text) == read_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("+.5", 0.5), ("-3", -3), ("1.0e-5", 1e-5), (".inf", math.inf), ("Null", None), ("~", None),
     ("TRUE", True), ("'5'", "5"), ('"null"', "null"), ("[a, 1, [true]]", ["a", 1, [True]])],
)  # fmt: skip
def test_values_are_what_every_version_of_yaml_says(text, value):
    assert read_yaml(text) == read_value(text) == value and type(read_value(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run:\n  a: 1\ndata: {}\nrun: {}\n", r"line 4: 'run' stands here and in line 1"),
        ("run:\n  a: 1\n  'a': 2\n", r"line 3: 'a' stands here and in line 2"),
        ("run: {a: [{b: 1, b: 2}]}", r"line 1: 'b' stands here"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", r"line 3: merge keys"),
        ("a: &x [1, *x]", r"line 1: an alias stands within its own anchor"),
        ("a: !!str 5", r"line 1: tag 'tag:yaml.org,2002:str': tags are not read"),
        ("a: 012", r"line 1: 012: is another number in another version of YAML"),
        ("a: [0x1F]", r"0x1F: is another number"),
        ("a: 0b11", r"0b11: is another number"),
        ("run:\n  a:\n", r"line 2: no value; write null for none"),
        ("a:\n  root: /data\n    arrow\n", r"line 2: '/data arrow' stands in several lines"),
        ("a:\n\tb: 1\n", r"not YAML: .*'\\t'"),
        ("? [a]\n: 1\n", r"line 1: a key is a list or a section"),
        ("a: 1\n---\nb: 2\n", r"not YAML: expected a single document"),
        ("[" * 5000, r"not YAML"),
    ],
)
def test_what_could_mean_two_things_is_refused(text, problem):
    with pytest.raises(UserError, match=problem) as raised:
        read_yaml(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", " ", "runs/a #1", "'5' # steps", "--- 5", "5\n6"])
def test_an_override_is_read_whole_or_refused(text):
    with pytest.raises(UserError, match=r"no value|YAML reads only"):
        read_value(text)


def test_an_alias_repeats_a_value():
    assert read_yaml("a: &tables [x, y]\nb: *tables\n") == {"a": ["x", "y"], "b": ["x", "y"]}


@hypothesis.given(strategies.text() | strategies.floats(allow_nan=False) | strategies.integers() | strategies.none())
@hypothesis.example("1e-4")
@hypothesis.example("0o17")
@hypothesis.example("08")
@hypothesis.example("no")
@hypothesis.example("a #1")
@hypothesis.example("a " * 100)
def test_what_is_written_is_read_back(value):
    assert read_yaml(write_yaml({"section": {"key": value, "list": [value]}})) == {
        "section": {"key": value, "list": [value]}
    }


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.max_steps=true", r"run\.max_steps: got True; .*integer"),
        ("run.max_steps=1_000", r"run\.max_steps: got '1_000'; .*integer"),
        ("run.save_every=1:30", r"run\.save_every: got '1:30'; .*integer"),
        ("run.save_every=off", r"run\.save_every: got 'off'; .*integer"),
        ("run.seed='7'", r"run\.seed: got '7'; .*integer"),
        ("run.cuda_graphs=yes", r"run\.cuda_graphs: got 'yes'; Input should be true or false"),
        ("step.pack=0", r"step\.pack: got 0; Input should be true or false"),
        ("data.train_tables=[2024]", r"data\.train_tables\.0: got 2024; Input should be a text; put it in quotes"),
        ("run.stop_at=", r"override 'run\.stop_at=': no value; write null"),
        ("optimizer.learning_rate=.inf", r"optimizer\.learning_rate: got inf, expected a finite number"),
        ("optimizer.weight_decay=1e999", r"optimizer\.weight_decay: got inf, expected a finite number"),
        ("optimizer.betas=[.nan, 0.9]", r"optimizer\.betas: got nan, expected a finite number"),
        ("model.init_std=.nan", r"model\.init_std: got nan, expected a finite number"),
        ("objectives.itc_weight=-.inf", r"objectives\.itc_weight: got -inf, expected a finite number"),
        ("run.output_dir=~/runs", r"run\.output_dir: got '~/runs', expected a path that is not empty and does not"),
        ("run.output_dir=''", r"run\.output_dir: got '', expected a path that is not empty"),
        ('run.output_dir="a\\0b"', r"run\.output_dir: got 'a\\x00b', expected a path .* without NUL"),
        ("weights.pretrained=~/model", r"weights\.pretrained: got '~/model', expected a path"),
    ],
)
def test_a_value_of_another_type_is_refused(override, problem):
    with pytest.raises(UserError, match=problem):
        load_config(None, [override])


def test_words_are_text_where_text_is_expected():
    config = load_config(None, ["data.val_split=no", "data.train_tables=[on, 2024-01-02]", "run.output_dir=1:30"])
    assert (config.data.val_split, config.data.train_tables, config.run.output_dir) == (
        "no",
        ("on", "2024-01-02"),
        "1:30",
    )


def test_an_override_given_twice_is_refused():
    with pytest.raises(UserError, match=r"run\.seed is given twice, before as '1'; keep one"):
        load_config(None, ["run.seed=1", "run.max_steps=3", "run.seed=2"])


def test_an_override_goes_into_an_empty_section(tmp_path):
    (tmp_path / "c.yaml").write_text("run:\n  # max_steps: 5\n")
    assert load_config(tmp_path / "c.yaml", ["run.seed=4"]).run.seed == 4


@pytest.mark.parametrize("text", ["0", "false", "[]", "''"])
def test_a_file_of_another_kind_is_not_taken_for_an_empty_one(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: got a \w+, expected sections"):
        load_config(tmp_path / "c.yaml")


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes("data:\n  root: größe\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.yaml: not UTF-8"):
        load_config(tmp_path / "c.yaml")
