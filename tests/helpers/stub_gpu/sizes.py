"""Everything small: sizes of the workload, the base model, and one case of each test."""

from __future__ import annotations

import dataclasses
from typing import Any

import sclkern
from benchmarks.harness import timing
from sclkern.tools.bench import roofline
from sclkern.tools.specs import SPECS, linear_cross_entropy

# The most of each dimension in a size of an op.
VARIANTS = ("separate/sdpa/compiled", "planned", "planned/graph")
LIMITS = {"B": 2, "T": 16, "N": 24, "M": 32, "Lq": 18, "Lk": 18, "longest": 18, "K": 8, "P": 8, "F": 2, "H": 12}


def small(values: dict[str, Any]) -> dict[str, Any]:
    """A size with its dimensions within ``LIMITS``."""
    return {
        name: min(value, LIMITS[name]) if isinstance(value, int) and name in LIMITS else value
        for name, value in values.items()
    }


def install() -> None:
    for spec in SPECS.values():
        for kind in ("sizes", "accuracy"):
            shrunk = tuple(dataclasses.replace(size, values=small(size.values)) for size in getattr(spec, kind))
            object.__setattr__(spec, kind, shrunk)
    linear_cross_entropy.VOCABULARY = 500
    preset = sclkern.SCLConfig.preset
    layers = {"text_layers": 1, "vision_layers": 1, "fusion_layers": 1}
    base = preset("tiny").replace(max_text_len=50, text_positions=52, **layers)
    sclkern.SCLConfig.preset = staticmethod(lambda name: base if name == "base" else preset(name))
    measure = roofline.measure
    roofline.measure = lambda: measure(copy_bytes=2**20, matrix=64)
    timing.ROTATED_BYTES = 1


def _once(fixture, run, args=(), kwargs=None, setup=None, **counts):
    """A benchmark of one round."""
    return _pedantic(fixture, run, args=args, kwargs=kwargs, setup=setup, rounds=1)


try:
    from pytest_benchmark.fixture import BenchmarkFixture
except ImportError:
    pass
else:
    _pedantic = BenchmarkFixture.pedantic
    BenchmarkFixture.pedantic = _once


def _path(item) -> tuple:
    """Equal for cases that take the same path on a GPU."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    case = parameters.get("case")
    if hasattr(case, "implementation"):
        # Each op by its kernel, each library and backend once, and each pass once.
        ours = case.implementation.name == "sclkern"
        name = case.op if ours else case.implementation.name
        return item.path, name, case.pass_ if case.op == "bias_gelu" else case.pass_ == "both"
    if item.path.stem == "test_step":
        return item.path, parameters.get("name") in VARIANTS and parameters["name"]
    return item.path, item.originalname, parameters.get("name") if item.path.stem == "test_smoke" else None


def _shrink(module) -> None:
    """Constants of a file of tests or benchmarks, and the depth of its models."""
    for name, value in {"REPETITIONS": 10, "ROWS": 1}.items():
        if hasattr(module, name):
            setattr(module, name, value)
    if hasattr(module, "MODELS"):
        one = {"num_hidden_layers": 1}
        module.MODELS = {
            name: (lambda layers, make=make: make(one), side) for name, (make, side) in module.MODELS.items()
        }


def pytest_collection_modifyitems(config, items):
    """Keep a case of each path."""
    kept = {}
    for item in items:
        path = _path(item)
        if path[-1] is not False:
            kept.setdefault(path, item)
        _shrink(item.module)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept.values()])
    items[:] = kept.values()
