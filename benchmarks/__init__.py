"""Benchmarks of sclkern; see benchmarks/README.md."""
