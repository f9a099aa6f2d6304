"""A few models on the kernels themselves: they compute the same, and every module calls the op that it claims."""

import collections

import pytest
import torch

import sclkern
from op_testing import needs_kernels, run_in_interpreter
from swapped_models.checks import agree, claims, compute, counted
from swapped_models.table import build

# Text, images, both; attention by the interface and by a module's own forward; each op that is swapped in.
CHOSEN = ["BertModel", "CLIPModel", "DistilBertModel", "ViltModel", "nn.TransformerEncoder, norm first"]
pytestmark = pytest.mark.models


@needs_kernels
@pytest.mark.parametrize("name", CHOSEN)
def test_model(name):
    model, inputs = build(name, attn_implementation="eager")
    model = model.float()
    inputs = {
        key: one.float() if torch.is_tensor(one) and one.is_floating_point() else one for key, one in inputs.items()
    }
    expected = compute(model, inputs)
    report = sclkern.fuse(model)
    calls = collections.Counter()
    with counted(model, calls):
        actual = compute(model, inputs)
    agree(actual, expected, 1e-4)
    claims(report, calls)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
