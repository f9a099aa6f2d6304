"""SCL in transformers: importing this registers model type "sclkern" with its Auto classes and pipelines.

>>> import sclkern.integrations.transformers
>>> classify = pipeline("zero-shot-image-classification", model=folder)

``docs/transformers.md`` has the folders that load, training by ``Trainer``, and what is not supported.
"""

import inspect
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from sclkern.integrations.transformers.config import SCLHFConfig
from sclkern.integrations.transformers.modeling import SCLHFModel, SCLOutput
from sclkern.integrations.transformers.processing import SCLImageProcessor, SCLProcessor

__all__ = ["SCLHFConfig", "SCLHFModel", "SCLImageProcessor", "SCLOutput", "SCLProcessor"]

AutoConfig.register(SCLHFConfig.model_type, SCLHFConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForZeroShotImageClassification):
    _auto.register(SCLHFConfig, SCLHFModel, exist_ok=True)
AutoProcessor.register(SCLHFConfig, SCLProcessor, exist_ok=True)
# Newer versions have a class for each of several backends, and say so where the one that they prefer has none.
_classes: dict[str, Any] = {"slow_image_processor_class": SCLImageProcessor}
if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
    _classes = {"image_processor_classes": dict.fromkeys(("pil", "torchvision"), SCLImageProcessor)}
AutoImageProcessor.register(SCLHFConfig, **_classes, exist_ok=True)
# The pipeline looks a model up by this table of names alone, and logs an error about one that is registered only.
MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[SCLHFConfig.model_type] = SCLHFModel.__name__
