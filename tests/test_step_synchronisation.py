"""A step reads nothing back to the host and copies nothing to the device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sclkern import ObjectiveConfig, SCLConfig, SCLModel

PICTURES = [pytest.param(None, id="images"), pytest.param(3, id="clips")]


def needs_false_image(objectives):
    return objectives.itm_negatives in ("dataset", "reference")


def build(make_model, make_batch, objectives, frames=None, **batch_options):
    model = make_model(objectives, max_frames=frames or 0)
    return model, make_batch(frames=frames, false_image=needs_false_image(objectives), **batch_options)


class HostReadError(AssertionError):
    pass


READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "_unique2"}


class NoHostReads(TorchDispatchMode):
    """Raise at any operation that on a GPU would wait for a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS:
            raise HostReadError(name)
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise HostReadError(f"{name} with a mask")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(monkeypatch):
    def refuse(name):
        def read(*args, **kwargs):
            raise HostReadError(name)

        return read

    with monkeypatch.context() as patch, NoHostReads():
        # These do not pass through a dispatched operation when the tensor is on the host already.
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: x.__setitem__(x > 0, torch.ones(3)),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_guard_sees_a_read(monkeypatch, read):
    with pytest.raises(HostReadError), no_host_reads(monkeypatch):
        read(torch.ones(3))


GUARDED = [
    {"recipe": "scl"},
    {"recipe": "glscl"},
    {"recipe": "glscl", "itm_negatives": "hard"},
    {"recipe": "glscl", "itm_negatives": "dataset", "encodings": "reference"},
    {"recipe": "glscl", "mlm_mask": "reference", "text_mask": "reference", "frame_norm": "reference"},
]


@pytest.mark.parametrize("frames", PICTURES)
@pytest.mark.parametrize("options", GUARDED)
def test_a_training_step_reads_nothing_back(make_model, make_batch, monkeypatch, options, frames):
    model, batch = build(make_model, make_batch, ObjectiveConfig(**options), frames)
    model.train()
    seed = torch.tensor(5)
    with no_host_reads(monkeypatch):
        model(batch, seed=seed).total.backward()


class NoHostTensors(TorchDispatchMode):
    """Raise at any operation on a tensor of the host: a copy to the device would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs))):
            raise HostReadError(f"{function} has a tensor of the host")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", GUARDED)
def test_a_step_on_a_device_copies_nothing_to_it(options):
    objectives = ObjectiveConfig(**options)
    # Fake tensors carry a device and a shape but no data: no GPU is needed, and reading a value raises.
    with FakeTensorMode():
        with torch.device("cuda"):
            model = SCLModel(SCLConfig.preset("tiny").replace(max_frames=2), objectives)
            image, ids = torch.randn(4, 2, 3, 32, 32), torch.zeros(4, 9, dtype=torch.int64)
        batch = {"image": image, "false_image": image, "text_ids": ids, "text_mask": ids + 1}
        with NoHostTensors():
            losses = model(batch, seed=5)
    assert losses.total.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", GUARDED)
def test_a_step_on_a_gpu_never_waits(make_model, make_batch, options):
    model, batch = build(make_model, make_batch, ObjectiveConfig(**options), frames=2)
    model = model.float().cuda().train()
    batch = {name: value.float().cuda() if value.is_floating_point() else value.cuda() for name, value in batch.items()}
    model(batch, seed=4).total.backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch, seed=5).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
