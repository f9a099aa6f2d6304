"""The memory of a process does not grow with the steps that it takes."""

import os
from pathlib import Path

import pytest

from tiny_run import NO_LAYERS, small_data

STEPS, WARM = 2000, 500


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.usefixtures("one_thread")
def test_memory_does_not_grow(pretraining, tmp_path):
    """With checkpoints and rows of the log, as in a long run."""
    options = {**NO_LAYERS, **small_data(tmp_path, 8), "run__batch_size": 2, "run__max_steps": STEPS}
    options |= {"run__log_every": 20, "run__save_every": 100, "run__stop_at": STEPS - 1, "evaluation__rerank": 0}
    # As few operations as a step can have.
    options |= {"objectives__recipe": "[itc, mlm]", "model__dropout": 0, "model__image_size": 32}
    options |= {"data__transform": "clip_test"}
    run = pretraining(**options)
    sizes = {}
    original = run.optimizer.step

    def step():
        original()
        if run.state.step % 100 == 50:
            sizes[run.state.step] = resident_bytes()

    run.optimizer.step = step
    assert not run.run()
    warm = max(size for step, size in sizes.items() if step <= WARM)
    late = min(size for step, size in sizes.items() if step > STEPS - WARM)
    # What one step left behind, 4 KiB, would be 5 MB at the end.
    assert late - warm < 4e6, {step: size / 1e6 for step, size in sizes.items()}
