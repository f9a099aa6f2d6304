"""The tasks of this package, each registered by its import."""

from sclkern.tasks import reasoning, vqav2
from sclkern.tasks.task import TASKS

__all__ = ["TASKS", "reasoning", "vqav2"]
