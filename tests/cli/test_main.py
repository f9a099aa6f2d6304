"""The command line itself: usage, help, exit statuses, and what is imported when."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sclkern import cli
from sclkern.cli import main, parse
from sclkern.errors import Interrupted, UserError, WorkerError

ROOT = Path(__file__).parents[2]
# Every command with the arguments that it requires.
COMMANDS = [
    ["pretrain"], ["plan"], ["configs"], ["convert", "in.ckpt", "out"], ["parity", "golden.safetensors"],
    ["data", "convert", "coco", "in", "--output", "out"],
    ["bench", "static"], ["bench", "report"], ["bench", "record", "base", "results.json"], ["bench", "roofline"],
    ["profile"], ["doctor"],
]  # fmt: skip


def run_python(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **options)


@pytest.mark.parametrize("args", [["pretrain", "--resum3"], ["parity", "a", "b"], ["pretraining"], []])
def test_wrong_usage_exits_with_two(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and "usage: sclkern" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_has_a_module(arguments):
    assert importlib.util.find_spec(parse(arguments).module) is not None


def test_help_loads_neither_torch_nor_a_command():
    code = f"""
import sys
from sclkern.cli import main
for arguments in {[[], *([*command[: 2 if command[0] in ("bench", "data") else 1]] for command in COMMANDS)]}:
    try:
        main([*arguments, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, arguments
loaded = set(sys.modules)
print(sorted(loaded & {{"torch", "numpy", "yaml", "pydantic", "triton"}}))
print(sorted(name for name in loaded if name.startswith("sclkern")))
"""
    with run_python("-c", code, stdout=subprocess.PIPE, text=True) as process:
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert lines[-2:] == ["[]", "['sclkern', 'sclkern.cli', 'sclkern.cli.parser', 'sclkern.errors']"]
    assert "usage: sclkern bench static" in "\n".join(lines)


def test_the_module_for_torchrun_is_pretrain():
    with run_python("-m", "sclkern.pretrain", "--help", stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read().startswith("usage: sclkern pretrain ")
    assert process.returncode == 0


def test_a_configuration_given_twice_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", "demo", "run.seed=1", "--config=pretrain_base"])
    assert stop.value.code == 2
    assert "--config: got 'pretrain_base', before 'demo'; keep one of them" in capsys.readouterr().err
    assert parse(["profile"]).config == "demo"


def test_overrides_may_stand_on_both_sides_of_options():
    options = parse(["plan", "run.seed=1", "--json", "run.max_steps=2", "--frames", "2", "run.batch_size=4"])
    assert options.overrides == ["run.seed=1", "run.max_steps=2", "run.batch_size=4"]
    assert options.json and options.frames == 2


class Command:
    """A stand-in for a command's module."""

    def __init__(self, error):
        self.error = error

    def run(self, options):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("width: got 3, expected 64"), 2, "error: width: got 3, expected 64"),
        (OSError(28, "No space left on device", "/full/file"), 2, "error: /full/file: No space left on device"),
        (OSError("broken"), 2, "error: broken"),
        (WorkerError("a data worker died"), 3, "error: a data worker died"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(signal.SIGTERM), 143, "interrupted by SIGTERM"),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda module: Command(error))
    assert main(["doctor"]) == status
    assert capsys.readouterr().err == f"sclkern doctor: {message}\n"


def test_a_missing_optional_package_is_named(monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert main(["bench", "static"]) == 2
    assert "sclkern bench: error: needs the package 'triton', which is not installed" in capsys.readouterr().err


def test_an_interpreted_kernel_is_not_compiled(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "static"]) == 2
    assert "TRITON_INTERPRET: got 1, an interpreted kernel cannot be compiled" in capsys.readouterr().err


def test_commands_that_train_limit_how_long_threads_spin(monkeypatch):
    limits = {}
    for arguments in COMMANDS:
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setattr(cli, "_load", lambda module: Command(UserError("stop")))
        main(arguments)
        limits[arguments[0]] = os.environ.get("GOMP_SPINCOUNT")
    assert {name for name, limit in limits.items() if limit == "1000"} == {"pretrain", "profile"}
    assert set(limits.values()) == {"1000", None}


def test_a_reader_that_has_enough_is_no_error():
    with run_python("-m", "sclkern.cli", "plan", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


def test_a_signal_while_a_command_is_loaded(monkeypatch, capsys):
    """Before the run takes signals itself."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_load", lambda module: signal.raise_signal(signal.SIGTERM))
    assert main(["pretrain"]) == 143
    assert capsys.readouterr().err == "sclkern pretrain: interrupted by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before
