"""Objectives of pre-training and their options."""

from sclkern.objectives.config import RECIPES, ObjectiveConfig

__all__ = ["RECIPES", "ObjectiveConfig"]
