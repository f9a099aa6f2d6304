"""What ``make gpu`` runs: stages of tests and benchmarks, most important first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Groups that run only where --only names them.
ONLY_BY_NAME = ("sanitizer", "tune", "training")


@dataclass(frozen=True)
class Stage:
    """One call of pytest, or of a Python module.

    Attributes:
        name: name in records.
        group: what ``--only`` names.
        arguments: of pytest; for a module, its name and its arguments.
        weight: its share of the remaining time, relative to the stages that follow.
        max_seconds: time limit.
        workers: processes where pytest-xdist is installed; 0 runs in pytest's own process, as benchmarks must.
        prefix: command before Python's.
        environment: further environment variables.
        module: ``arguments`` are a Python module, which takes ``--budget`` and ``--results``.
        dry: further arguments in a dry run.
    """

    name: str
    group: str
    arguments: Sequence[str]
    weight: float
    max_seconds: float = float("inf")
    workers: int = 0
    prefix: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    module: bool = False
    dry: Sequence[str] = ()


def files_that_use_a_gpu(tests: Path = ROOT / "tests") -> list[str]:
    """The tests of ops and modules, which run kernels where there is a GPU, and other files with a ``gpu`` mark."""
    folders = {"gpu", "ops", "nn"}
    files = (file for file in sorted(tests.rglob("test_*.py")) if file.parent.name not in folders)
    return [str(tests / "ops"), str(tests / "nn"), *(str(f) for f in files if "pytest.mark.gpu" in f.read_text())]


def stages() -> list[Stage]:
    """All stages in the order in which they run, most important first.

    Weights are seconds of a budget of 400: the first four, which say whether the kernels are right and the step is
    faster, have ended after 200.
    """
    smoke, large = "tests/gpu/test_smoke.py", "tests/gpu/test_large_tensors.py"
    accuracy, step, ops = "tests/gpu/test_accuracy.py", "benchmarks/cases/test_step.py", "benchmarks/cases/test_ops.py"
    names = (
        *("step_on_a_gpu", "accuracy", "cuda_graphs", "repeatability", "libraries", "profile", "compiled"),
        "normalising_on_a_gpu",
    )
    whole = [f"tests/gpu/test_{name}.py" for name in names]
    # Interpreted and compiled-only kernels are tested without a GPU.
    kernels = [*files_that_use_a_gpu(), "-k", "not in_the_interpreter"]
    # Otherwise torch.compile starts a process for every core in each worker.
    one_compiler = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

    one_op = ("-k", "bias_gelu")

    def benchmark(name: str, group: str, weight: float, *arguments: str, **options: Any) -> Stage:
        return Stage(name, group, ["--benchmark-only", *arguments], weight, **options)

    all_stages = [
        Stage("smoke", "smoke", [smoke], 40, max_seconds=90, workers=4),
        Stage("tests/accuracy", "tests", [accuracy, "-k", "error and bfloat16"], 40, max_seconds=90, workers=6),
        benchmark("step/64", "step", 60, step, "-k", "64-planned or (64-separate and not compiled)", max_seconds=120),
        benchmark("ops/1", "ops", 60, "--priority", "1", ops),
        # A worker holds up to 10 GiB of GPU memory in float64.
        Stage("tests/whole", "tests", whole, 50, workers=6, environment=one_compiler),
        Stage("tests/kernels", "tests", kernels, 50, workers=8, dry=("-m", "gpu")),
        Stage("tests/large", "tests", [large], 20, workers=1, dry=("--collect-only",)),
        benchmark("step", "step", 30, step, "-k", "not 64-planned and not (64-separate and not compiled)"),
        benchmark("models", "models", 20, "benchmarks/cases/test_models.py", max_seconds=120),
        benchmark("contrast", "contrast", 10, "benchmarks/cases/test_contrast.py", max_seconds=180, dry=("-k", "1024")),
        benchmark("ops/2", "ops", 15, "--priority", "2", ops, dry=one_op),
        benchmark("ops/3", "ops", 5, "--priority", "3", ops, dry=one_op),
    ]
    for tool in ("memcheck", "initcheck"):
        prefix = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", "--error-exitcode", "1"]
        # Each tensor is an allocation of its own, so that a write past the end is detected.
        separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        all_stages.append(Stage(f"sanitizer/{tool}", "sanitizer", [smoke], 1, prefix=prefix, environment=separate))
    all_stages.append(Stage("tune", "tune", ["benchmarks.tuning"], 1, module=True, dry=("--op", "mask_text")))
    training = ["benchmarks.training.pretraining", "--ways", "fused,eager,graphs", "--profile"]
    few = ("--ways", "fused,graphs", "--steps", "2", "--exact-steps", "2", "--batch-size", "4", "--preset", "tiny")
    all_stages.append(Stage("training", "training", training, 6, module=True, dry=few))
    return all_stages
