"""The tests for a GPU that has the libraries, run by the stand-ins."""

import importlib.util
from pathlib import Path

import pytest
import torch

import stand_ins

FILE = Path(__file__).parents[1] / "gpu" / "test_libraries.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run here")
@pytest.mark.parametrize("name", ["flash_attn", "flash_attns_dropout", "apexs_layer_norm", "apexs_adam"])
def test_it_fits_the_functions(monkeypatch, name):
    stand_ins.install(monkeypatch)
    spec = importlib.util.spec_from_file_location("gpu_libraries", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, f"test_{name}")()
