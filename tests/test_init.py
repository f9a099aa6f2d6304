"""The names of the package itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sclkern
from sclkern.step import SCLLosses


@pytest.mark.parametrize("name", sclkern.__all__)
def test_every_exported_name_is_there(name):
    assert getattr(sclkern, name) is not None and name in dir(sclkern)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(sclkern.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname for node in block.body for alias in node.names}
    assert seen == {*sclkern.__all__, "nn", "ops"} - {"__version__"}


def test_losses_have_one_class():
    assert sclkern.SCLLosses is SCLLosses
