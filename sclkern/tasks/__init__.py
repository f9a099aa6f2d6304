"""Downstream tasks of a pre-trained model, and their metrics."""
