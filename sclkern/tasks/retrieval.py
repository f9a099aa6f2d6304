"""Metrics of image-text and video-text retrieval."""

from sclkern.evaluation.ranking import recall, rsum

__all__ = ["recall", "rsum"]
