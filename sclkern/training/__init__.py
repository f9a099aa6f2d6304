"""Pre-training: configuration, optimiser, loop, checkpoints, evaluation and report."""
