"""What ``make gpu`` runs: stages of tests and benchmarks, most important first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


def files_that_use_a_gpu(tests: Path = ROOT / "tests") -> list[str]:
    """The tests of ops and modules, which run kernels where there is a GPU, and other files with a ``gpu`` mark."""
    folders = {"gpu", "ops", "nn"}
    files = (file for file in sorted(tests.rglob("test_*.py")) if file.parent.name not in folders)
    return [str(tests / "ops"), str(tests / "nn"), *(str(f) for f in files if "pytest.mark.gpu" in f.read_text())]


def stages() -> list[Stage]:
    """All stages in the order in which they run, most important first."""
    smoke, large = "tests/gpu/test_smoke.py", "tests/gpu/test_large_tensors.py"
    names = ("step_on_a_gpu", "accuracy", "cuda_graphs", "repeatability", "libraries", "profile", "compiled")
    whole = [f"tests/gpu/test_{name}.py" for name in names]
    # Interpreted and compiled-only kernels are tested without a GPU.
    kernels = [*files_that_use_a_gpu(), "-k", "not in_the_interpreter"]
    # Otherwise torch.compile starts a process for every core in each worker.
    one_compiler = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    all_stages = [
        Stage("smoke", "smoke", [smoke], 20, max_seconds=90, workers=4),
        # A worker holds up to 10 GiB of GPU memory in float64.
        Stage("tests/whole", "tests", whole, 6, workers=6, environment=one_compiler),
        Stage("tests/kernels", "tests", kernels, 6, workers=8),
        Stage("tests/large", "tests", [large], 3, workers=1),
        Stage("step", "step", ["--benchmark-only", "benchmarks/cases/test_step.py"], 4),
        Stage("models", "models", ["--benchmark-only", "benchmarks/cases/test_models.py"], 1, max_seconds=120),
    ]
    for priority, weight in ((1, 4), (2, 2), (3, 1)):
        arguments = ["--benchmark-only", "--priority", str(priority), "benchmarks/cases/test_ops.py"]
        all_stages.append(Stage(f"ops/{priority}", "ops", arguments, weight))
    for tool in ("memcheck", "initcheck"):
        prefix = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", "--error-exitcode", "1"]
        # Each tensor is an allocation of its own, so that a write past the end is detected.
        separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        all_stages.append(Stage(f"sanitizer/{tool}", "sanitizer", [smoke], 1, prefix=prefix, environment=separate))
    all_stages.append(Stage("tune", "tune", ["benchmarks.tuning"], 1, module=True))
    training = ["benchmarks.training.pretraining", "--ways", "fused,eager,graphs", "--profile"]
    all_stages.append(Stage("training", "training", training, 6, module=True))
    return all_stages
