"""What ``sclkern.nn`` offers, and how it is reached."""

import inspect

import torch

import sclkern
from sclkern import nn, ops


def test_subpackages_need_no_import_of_their_own():
    assert sclkern.__getattr__("nn") is nn and sclkern.__getattr__("ops") is ops
    assert {"nn", "ops"} <= set(dir(sclkern))


def test_every_module_is_exported():
    found = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, torch.nn.Module)}
    assert found == set(nn.__all__)
