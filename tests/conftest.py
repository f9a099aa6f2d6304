"""What the tests share: a seed, a tiny model, a batch for it."""

from __future__ import annotations

import os

# Before torch is imported, for the reason given in sclkern/cli/__init__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import hypothesis
import pytest
import torch

from sclkern import SCLConfig, SCLModel
from sclkern.objectives import OBJECTIVES
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted

if TRITON_INSTALLED and interpreted():
    from sanitizer import bfloat16, interpreter

    bfloat16.install()

# The same examples on every run, however slow the machine is.
hypothesis.settings.register_profile("sclkern", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("sclkern")


# Files whose tests interpret or compile kernels, start other processes or train; `make quick` leaves them out.
SLOW_FILES = (
    "benchmarks/test_benchmarks.py", "benchmarks/test_dry_run.py", "benchmarks/test_gpu_runner.py",
    "benchmarks/test_pretraining.py",
    "benchmarks/test_tuning.py", "cli/test_plan.py", "cli/test_pretrain.py", "contributing/test_ways.py",
    "data/test_factors.py", "data/test_loader.py", "data/test_workers.py", "examples/test_demo_tasks.py",
    "integrations/fuse/test_use.py",
    "integrations/test_attention_maps.py", "integrations/test_packed_vision.py", "integrations/test_transformers.py",
    "libraries/test_stub_gpu.py", "ops/test_every_op.py",
    "processes/test_data.py", "processes/test_evaluation.py", "processes/test_mixed.py",
    "processes/test_fuse_gather.py", "processes/test_retrieval.py", "step/test_keyed.py", "step/test_memory.py",
    "step/test_plan.py", "step/test_step.py", "test_distributed.py", "test_packaging.py", "tools/static/test_static.py",
    "tasks/test_own_retrieval.py", "tools/test_ledger.py", "tools/test_parity.py", "tools/test_warmup.py",
    "training/test_choices.py",
    "training/test_memory.py", "training/test_mixed_training.py",
    "training/test_resume.py",
    "training/test_saved_runs.py", "training/test_stopping.py", "training/test_undecodable.py",
    "training/test_validation.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--sanitize",
        action="store_true",
        help="check every access to memory of kernels that Triton interprets (tests/helpers/sanitizer)",
    )


def pytest_configure(config):
    if config.getoption("--sanitize"):
        if not (TRITON_INSTALLED and interpreted()):
            raise pytest.UsageError("--sanitize: Triton does not interpret kernels; set TRITON_INTERPRET=1")
        interpreter.install()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.as_posix().endswith(SLOW_FILES) or item.name.startswith("test_in_the_interpreter"):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def objectives_as_shipped():
    """Objectives that a test registers are gone after it."""
    shipped = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(shipped)


def build_model(objectives=None, *, dtype=torch.float64, seed=1, **changes):
    torch.manual_seed(seed)
    model = SCLModel(SCLConfig.preset("tiny").replace(**changes), objectives)
    # Away from the initial zeros, ones and small weights, which hide a mix-up of biases, norms and tokens.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def build_batch(rows=4, *, frames=None, lengths=None, width=None, false_image=False, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths or [(10, 7, 12, 5, 3, 9)[i % 6] for i in range(rows)])
    width = width or int(lengths.max())
    column = torch.arange(width)
    ids = torch.randint(3, 119, (rows, width), generator=generator)
    ids[:, 0] = 0
    ids[torch.arange(rows), lengths - 1] = 2
    mask = column < lengths[:, None]
    shape = (rows, 3, 32, 32) if frames is None else (rows, frames, 3, 32, 32)
    batch = {
        "image": torch.randn(shape, generator=generator, dtype=dtype),
        "text_ids": ids.masked_fill(~mask, 1),
        "text_mask": mask,
    }
    if false_image:
        batch["false_image"] = torch.randn(shape, generator=generator, dtype=dtype)
    return batch


@pytest.fixture(scope="session")
def make_model():
    """(objectives, dtype=, seed=, **config) -> the tiny model in eval mode, float64, with weights of some size."""
    return build_model


@pytest.fixture(scope="session")
def make_batch():
    """(rows, frames=, lengths=, width=, false_image=, dtype=, seed=) -> a batch for the tiny model."""
    return build_batch
