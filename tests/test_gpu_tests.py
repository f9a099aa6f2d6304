"""Tests for a GPU, run where there is none with stand-ins for the kernels.

They say nothing about a GPU: what is found is a call that no longer fits its function.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import cpu_kernels
from op_testing import DIFFERENTIABLE, DRAWS, cast, small_inputs
from sclkern.ops import dispatch
from sclkern.tools.specs import SPECS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or dispatch.interpreted(), reason="kernels run here, and so do the tests themselves"
)


def load(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", Path(__file__).parent / "gpu" / f"test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMOKE, REPEATABILITY = load("smoke"), load("repeatability")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    cpu_kernels.install()
    monkeypatch.setattr(dispatch, "_problems", lambda devices, dtypes: ())


@pytest.mark.parametrize("name", SPECS)
def test_smoke(name):
    if name in DRAWS:
        SMOKE.test_a_draw_is_that_of_the_cpu(name)
    else:
        SMOKE.test_an_op_gives_what_eager_ops_give(name)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_passes(name):
    options = REPEATABILITY.KERNEL.get(name, {})
    arguments = cast(name, small_inputs(name, 5), torch.bfloat16, ("temperature",))
    assert REPEATABILITY.count_of_differing(name, arguments, 1, **options) == 0
    REPEATABILITY.test_forward_and_backward_are_those_of_a_cpu(name)


def test_draws():
    REPEATABILITY.test_attention_drops_the_probabilities_that_a_cpu_drops()
    REPEATABILITY.test_layer_norm_drops_the_elements_that_a_cpu_drops()
    for published in (False, True):
        for kind in ("mlm", "completion"):
            REPEATABILITY.test_text_masks_are_those_of_a_cpu(kind, published)
    for kind in ("select_patches", "select_tokens"):
        REPEATABILITY.test_patches_are_those_of_a_cpu(kind, 197)
