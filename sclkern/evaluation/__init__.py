"""Evaluation of a model: zero-shot retrieval and attention maps."""
