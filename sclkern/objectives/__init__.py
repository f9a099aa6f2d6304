"""Objectives of pre-training: one file each, one table, and their options.

Sources: SCL, arXiv 2211.13437; GLSCL, arXiv 2306.07096; their code (IIGROUP/SCL at cd0d819), whose files are named
where a formula stands. ``docs/step.md`` adds an objective from outside the package.
"""

from sclkern.objectives.config import RECIPES, ObjectiveConfig
from sclkern.objectives.downstream import visual_question_answering, visual_reasoning
from sclkern.objectives.inputs import LossInputs, TokenPositions
from sclkern.objectives.itc import ITC, contrast_temperature, image_text_contrast
from sclkern.objectives.itm import ITM, image_text_matching
from sclkern.objectives.mlm import MLM, masked_language_modeling
from sclkern.objectives.mlsc import MLSC, masked_language_semantic_completion
from sclkern.objectives.mltc import MLTC, masked_local_token_completion
from sclkern.objectives.mvsc import MVSC, masked_vision_semantic_completion
from sclkern.objectives.objective import OBJECTIVES, LossOutput, Objective, register
from sclkern.objectives.views import View, ViewOutputs

# The order in which losses are summed and reported.
for _objective in (ITM, MLM, ITC, MVSC, MLSC, MLTC):
    register(_objective)

__all__ = [
    "OBJECTIVES",
    "RECIPES",
    "LossInputs",
    "LossOutput",
    "Objective",
    "ObjectiveConfig",
    "TokenPositions",
    "View",
    "ViewOutputs",
    "contrast_temperature",
    "image_text_contrast",
    "image_text_matching",
    "masked_language_modeling",
    "masked_language_semantic_completion",
    "masked_local_token_completion",
    "masked_vision_semantic_completion",
    "register",
    "visual_question_answering",
    "visual_reasoning",
]
