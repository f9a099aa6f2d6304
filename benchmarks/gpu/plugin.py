"""A pytest plugin of ``make gpu``.

It logs a line for each test as it ends, ends a worker whose CUDA context was lost, so that a new one starts, and stands
in for hypothesis where that is not installed: tests of drawn examples are skipped, the others run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

LOG = "SCLKERN_EACH_TEST"


class _Anything:
    """Accepts every call, attribute and operator, in place of strategies and settings that no test uses."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments, **options) -> _Anything:
        return self

    def __or__(self, other) -> _Anything:
        return self

    def __iter__(self):
        return iter(())


def _settings(*arguments, **options):
    return lambda function: function


def hypothesis_stand_in() -> dict[str, types.ModuleType]:
    """Modules by name in place of hypothesis: files that use it can be imported, their drawn tests are skipped."""
    module, strategies = types.ModuleType("hypothesis"), types.ModuleType("hypothesis.strategies")
    module.given = lambda *arguments, **options: pytest.mark.skip(reason="hypothesis is not installed")
    module.settings = _settings
    module.settings.register_profile = module.settings.load_profile = lambda *arguments, **options: None
    module.example = module.seed = _settings
    module.assume = module.note = lambda *arguments: True
    module.HealthCheck = _Anything()
    strategies.__getattr__ = _Anything().__getattr__
    module.strategies = strategies
    modules = {"hypothesis": module, "hypothesis.strategies": strategies}
    for name, stand_in in modules.items():
        stand_in.__spec__ = ModuleSpec(name, None)  # torch.compile asks for it
    return modules


# While the plugin is imported: conftest.py imports hypothesis afterwards.
if importlib.util.find_spec("hypothesis") is None:
    sys.modules.update(hypothesis_stand_in())


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return next(iter(crash.message.splitlines()), "")
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return report.longrepr[-1].removeprefix("Skipped: ")
    return next(iter(reversed(str(report.longrepr).splitlines())), "")


def _write(row: dict) -> None:
    if LOG in os.environ:
        with Path(os.environ[LOG]).open("a") as stream:
            stream.write(json.dumps(row) + "\n")


class _EachTest:
    """Logs one line for each test and for each file that cannot be collected; in pytest's main process only."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome != "passed":
            row["reason"] = _reason(report)[:400]
        row |= {name: value for name, value in report.user_properties if isinstance(value, (str, int, float))}
        _write(row)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            row = {"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "reason": _reason(report)[:400]}
            _write(row)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_EachTest())


_failed = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    global _failed
    report = yield
    _failed = _failed or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    global _failed
    _failed = False
    result = yield
    if _failed and hasattr(item.config, "workerinput") and context_is_lost():
        # After an illegal access every later call fails: the tests that follow need a new process.
        os._exit(3)
    return result


def context_is_lost() -> bool:
    """Whether the CUDA context fails every call."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
