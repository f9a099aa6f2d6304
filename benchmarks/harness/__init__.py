"""What the benchmark cases share: cases of ops, the check against float64, timing, profiler traces."""
