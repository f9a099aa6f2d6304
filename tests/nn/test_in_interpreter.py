"""Every module on the kernels, in one process that interprets them."""

from pathlib import Path

from op_testing import run_in_interpreter


def test_in_the_interpreter():
    run_in_interpreter(str(Path(__file__).parent))
