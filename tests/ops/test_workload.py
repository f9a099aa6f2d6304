"""Every op at lengths and widths of the workload, with few samples and heads: the kernels in the interpreter."""

from dataclasses import replace

import pytest
import torch

from op_testing import (
    DTYPES,
    SHAPES,
    assert_op_as_exact,
    cast,
    inputs_at,
    needs_kernels,
    run_in_interpreter,
    thorough_except,
)

# Samples, groups, heads, kept patches, rows of features and of tokens, at most; width where heads make it up.
FEW = {"B": 1, "G": 2, "H": 1, "K": 16, "N": 33, "T": 5, "W": 64}
# The first shape of each op.
FIRST = {op: name for name, (op, _) in reversed(SHAPES.items())}.values()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", thorough_except(FIRST, SHAPES))
def test_error_is_at_most_that_of_eager(name, dtype):
    op, shape = SHAPES[name]
    values = {key: min(value, FEW.get(key, value)) for key, value in shape.values.items()}
    shape = replace(shape, values={"H": FEW["H"], "W": FEW["W"]} | values)
    torch.manual_seed(0)
    assert_op_as_exact(op, cast(op, inputs_at(op, shape), dtype, shape.float32), shape)


def test_in_the_interpreter():
    run_in_interpreter(__file__)
