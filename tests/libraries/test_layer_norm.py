"""The LayerNorm of the network by name: torch's, or apex's by a stand-in of its function."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import stand_ins
from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.libraries import apex
from sclkern.models.norms import LayerNorm
from sclkern.step import StepConfig
from step_testing import assert_same, masks_of, run

EVERY_HEAD = ("itm", "mlm", "itc", "vqa", "nlvr2", "rank")


@pytest.fixture
def installed(monkeypatch):
    stand_ins.install(monkeypatch)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ["torch", "apex"])
@pytest.mark.parametrize("frames", [None, 3])
def test_the_step_is_the_same(installed, make_model, make_batch, name, frames, backend):
    model = make_model(ObjectiveConfig("glscl"), max_frames=frames or 0).set_backend(backend)
    batch = make_batch(frames=frames)
    masks = masks_of(model, batch, 5)
    expected = run(model, batch, masks)
    assert_same(run(model.set_layer_norm(name), batch, masks), expected)


def test_every_norm_of_every_head_holds_the_setting(installed):
    model = SCLModel(SCLConfig.preset("tiny").replace(heads=EVERY_HEAD, token_types=3)).set_layer_norm("apex")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms and all(isinstance(norm, LayerNorm) and norm.execution is model.execution for norm in norms)


def test_no_norm_stays_with_another(installed, monkeypatch, make_model, make_batch):
    model, batch = make_model(ObjectiveConfig("glscl")).set_layer_norm("apex"), make_batch()
    theirs, inside = apex.FUSED_LAYER_NORM, []
    assert theirs.problem() is None
    own, torchs = theirs.call, F.layer_norm

    def call(*arguments):
        inside.append(id(arguments[1]))
        return own(*arguments)

    def layer_norm(*arguments):
        assert id(arguments[2]) in inside, "torch's own"
        return torchs(*arguments)

    monkeypatch.setattr(theirs, "call", call)
    monkeypatch.setattr(F, "layer_norm", layer_norm)
    model(batch, seed=0)
    used = {name for name, parameter in model.named_parameters() if id(parameter) in inside}
    assert used == {name for name, _ in model.named_parameters() if "norm" in name and name.endswith("weight")} | {
        "text_projection.1.weight", "image_projection.1.weight"
    }  # fmt: skip


def test_the_state_is_the_same(installed):
    first, second = SCLModel(SCLConfig.preset("tiny")), SCLModel(SCLConfig.preset("tiny")).set_layer_norm("apex")
    assert list(first.state_dict()) == list(second.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.execution.layer_norm == "apex"


@pytest.mark.parametrize("name", ["torch", "apex"])
def test_dropout_falls_on_the_update(installed, make_model, name):
    norm = make_model(dropout=0.5).fusion.text_layers[0].mlp_norm.train()
    norm.execution.layer_norm = name
    stream, update = torch.zeros(200, 64, dtype=torch.float64), torch.ones(200, 64, dtype=torch.float64)
    out, total = norm.with_sum(stream, update)
    assert set(total.unique().tolist()) == {0.0, 2.0} and 0.4 < (total > 0).double().mean() < 0.6
    torch.testing.assert_close(out, F.layer_norm(total, (64,), norm.weight, norm.bias, norm.eps))
    assert torch.equal(norm.eval()(stream, update), norm(stream + update))


def test_under_autocast_apexs_is_float32(installed):
    """As torch's on a GPU. The stream would else be rounded to bfloat16 by each norm of a post-norm layer."""
    norm = LayerNorm(8)
    norm.execution.layer_norm = "apex"
    x = torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.layer_norm(x.float(), (8,)))


def test_recomputed_blocks_draw_the_same_dropout(installed, make_model, make_batch):
    batch, results = make_batch(), []
    for checkpointed in (False, True):
        model = make_model(dropout=0.3).train().set_layer_norm("torch")
        model.step = StepConfig(checkpoint_blocks=checkpointed)
        masks = masks_of(model, batch, 5)
        torch.manual_seed(7)
        results.append(run(model, batch, masks))
    assert_same(*results)


def test_another_name_is_refused(make_model):
    with pytest.raises(ValueError, match="layer_norm: got 'rms', expected one of sclkern, torch, apex"):
        make_model().set_layer_norm("rms")


@pytest.mark.parametrize(
    ("absent", "put", "message"),
    [
        ("apex", None, "apex is not installed: build NVIDIA's apex with its CUDA extensions, "),
        ("apex", "apex", "apex is installed, but apex.normalization.fused_layer_norm.fused_layer_norm_affine does not"),
        (
            "fused_layer_norm_cuda",
            None,
            "apex is installed, but apex.normalization.fused_layer_norm.fused_layer_norm_a",
        ),
    ],
)
def test_without_apex_it_is_refused(installed, monkeypatch, make_model, absent, put, message):
    """Not installed; the package index's, which is another library; and built without its extensions."""
    for known in [known for known in sys.modules if known.partition(".")[0] == absent]:
        monkeypatch.delitem(sys.modules, known)
    if put:
        monkeypatch.setitem(sys.modules, put, ModuleType(put))
    with pytest.raises(ValueError) as error:
        make_model().set_layer_norm("apex")
    assert str(error.value).startswith(f"layer_norm: got 'apex', but {message}")
    assert apex.REMEDY in str(error.value)


def test_a_cpu_is_refused(installed, monkeypatch, make_model, make_batch):
    monkeypatch.setattr(apex, "DEVICE_TYPES", {"cuda"})
    with pytest.raises(ValueError, match="layer_norm='apex': cannot run: tensors on cpu, apex needs a CUDA GPU"):
        make_model().set_layer_norm("apex")(make_batch(), seed=0)
