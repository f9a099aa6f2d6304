"""Pre-training: configuration, data, optimiser, loop, checkpoints and report."""
