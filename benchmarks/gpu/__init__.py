"""Tests and benchmarks on a GPU, in stages within a time budget: ``make gpu``, or ``python -m benchmarks.gpu``."""
