"""Adapters of libraries that need not be installed: each says why it cannot run, and computes what our ops compute."""
