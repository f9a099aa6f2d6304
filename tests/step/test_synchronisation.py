"""A step reads nothing back to the host and copies nothing to the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.step import StepConfig, contrast_batch, target_counts
from step_testing import build


class HostReadError(AssertionError):
    pass


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0] + 1,
        lambda x: x.masked_select(x > 0),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
    ],
)
def test_a_fake_tensor_cannot_be_read(read):
    with (
        FakeTensorMode() as mode,
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError)),
    ):
        read(mode.from_tensor(torch.ones(3)))


GUARDED = [
    {"recipe": "scl"},
    {"recipe": "glscl"},
    {"recipe": ("itc", "mltc")},
    {"recipe": "glscl", "itm_negatives": "hard"},
    {"recipe": "glscl", "itm_negatives": "dataset"},
    {"recipe": "glscl", "mlm_mask": "published", "text_mask": "published", "frame_norm": "published"},
    {"recipe": "glscl", "empty_selections": "published", "directions": "recovered_to_complete"},
    dataclasses.asdict(ObjectiveConfig.published("glscl")),
]
STEPS = [
    StepConfig(share_encodings="all", absorb="never"),
    StepConfig(share_encodings="none", prune_last_layer=False, checkpoint_blocks=True),
    StepConfig.published(),
]


@pytest.mark.parametrize("frames", [1, 2], ids=["images", "clips"])
@pytest.mark.parametrize("options", GUARDED)
def test_a_training_step_reads_nothing_back(monkeypatch, options, frames):
    """Forward and backward on the path that a GPU takes, its kernels replaced by their shapes."""
    # The ops take their kernels, which fake tensors never run, and leave out what they check on a CPU alone.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        model = SCLModel(SCLConfig.preset("tiny").replace(max_frames=2), ObjectiveConfig(**options)).train()
        losses = model(fake_batch(frames), seed=torch.empty(1, dtype=torch.int64))
        losses.total.backward()
        assert all(loss.shape == () for loss in losses.named().values())
        assert model.vision.position.grad.shape == model.vision.position.shape


@pytest.mark.parametrize("step", STEPS, ids=["shared", "recomputed", "published"])
def test_no_way_to_execute_it_reads_anything_back(monkeypatch, step):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        model = SCLModel(SCLConfig.preset("tiny").replace(max_frames=2), ObjectiveConfig(recipe="glscl")).train()
        model.step = step
        model(fake_batch(2), seed=torch.empty(1, dtype=torch.int64)).total.backward()
    with FakeTensorMode(), torch.device("cuda"):
        model, batch = SCLModel(model.config, model.objectives), fake_batch(2)
        model.step = step
        with NoHostTensors():
            assert model(batch, seed=5).total.device.type == "cuda"


def fake_batch(frames):
    image, ids = torch.randn(4, frames, 3, 32, 32), torch.zeros(4, 9, dtype=torch.int64)
    return {"image": image, "false_image": image, "text_ids": ids, "text_mask": ids + 1, "text_tokens": 30}


def placed_batch(frames, brought):
    """A part of a global batch, with the images of its false places or without."""
    batch = fake_batch(frames)
    place = torch.zeros(4, dtype=torch.int64)
    batch |= {"place": place, "match_labels": place, "false_place": place[:2], "false_image": batch["image"][:2]}
    return batch if brought else {name: value for name, value in batch.items() if name != "false_image"}


@pytest.mark.parametrize("brought", [True, False])
@pytest.mark.parametrize("step", [StepConfig(), StepConfig.published()], ids=["planned", "published"])
def test_a_part_of_a_global_batch_reads_nothing_back(monkeypatch, step, brought):
    with FakeTensorMode(), torch.device("cuda"):
        model = SCLModel(SCLConfig.preset("tiny").replace(max_frames=2), ObjectiveConfig(recipe="glscl")).train()
        model.step, batch = step, placed_batch(2, brought)
        with NoHostTensors():
            counts = target_counts(model.config, model.objectives, [batch, batch], 5)
            features = model.contrast_features(batch, seed=5, names=("itc", "mltc"))
            losses = model(batch, seed=5, counts=counts)
        assert losses.total.device.type == features["itc"]["image"].device.type == "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        model = SCLModel(SCLConfig.preset("tiny").replace(max_frames=2), ObjectiveConfig(recipe="glscl")).train()
        model.step, batch = step, placed_batch(2, brought)
        seed = torch.empty(1, dtype=torch.int64)
        counts = target_counts(model.config, model.objectives, [batch], seed)
        contrasts = contrast_batch(model, [batch, batch], seed)
        model(batch, seed=seed, counts=counts, contrast=contrasts[1]).total.backward()


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
            batch = fake_batch(2)
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
