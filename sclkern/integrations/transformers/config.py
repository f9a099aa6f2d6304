"""The configuration of SCL as transformers stores it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from sclkern.errors import UserError
from sclkern.models.config import MODEL_TYPE, SCLConfig
from sclkern.objectives import ObjectiveConfig

# The fields of SCLConfig, in their order.
SIZES = tuple(field.name for field in dataclasses.fields(SCLConfig))
# As near to a field as this, a name that transformers does not know is a mistake.
_MISSPELT = 0.8


class SCLHFConfig(PreTrainedConfig):
    """Sizes of ``SCLConfig`` with the objectives of the loss, as a configuration of transformers.

    Each field of ``SCLConfig`` is an attribute; ``hidden_size`` is ``width``, and ``pad_token_id`` is ``pad_id``.

    Args:
        objectives: fields of ``ObjectiveConfig`` that are not its defaults, such as ``{"recipe": "glscl"}``.
        **options: fields of ``SCLConfig``; others are transformers' own.

    Attributes:
        model_type: "sclkern".
        attribute_map: names of transformers for those of ``SCLConfig``.
        keys_to_ignore_at_inference: of the output, what ``Trainer`` does not collect.

    Raises:
        UserError: sizes that ``SCLConfig`` refuses, an unknown objective or option of one, or tied embeddings.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012 (transformers declares it as a class variable)
        "hidden_size": "width",
        "bos_token_id": "bos_id",
        "pad_token_id": "pad_id",
        "eos_token_id": "eos_id",
        "initializer_range": "init_std",
    }
    keys_to_ignore_at_inference = ["losses"]  # noqa: RUF012 (likewise)

    def __init__(self, objectives: Mapping[str, Any] | None = None, **options: Any) -> None:
        for theirs, ours in self.attribute_map.items():
            if theirs in options:
                options.setdefault(ours, options.pop(theirs))
        sizes = {name: options.pop(name) for name in SIZES if name in options}
        for name in options:
            if near := difflib.get_close_matches(name, SIZES, 1, _MISSPELT):
                raise UserError(f"{name}: unknown option, did you mean {near[0]!r}?")
        for name, value in dataclasses.asdict(SCLConfig.from_dict(sizes)).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        self.objectives = dict(objectives or {})
        self.objective_config()
        options.setdefault("tie_word_embeddings", False)
        super().__init__(**options)
        check_untied(self)

    def network_config(self) -> SCLConfig:
        """The sizes as the network takes them.

        Returns:
            The sizes.

        Raises:
            UserError: an attribute was set to what ``SCLConfig`` refuses.
        """
        return SCLConfig.from_dict({name: getattr(self, name) for name in SIZES})

    def objective_config(self) -> ObjectiveConfig:
        """The objectives as the step takes them.

        Returns:
            The objectives.

        Raises:
            UserError: an unknown option, or a value that ``ObjectiveConfig`` refuses.
        """
        known = [field.name for field in dataclasses.fields(ObjectiveConfig)]
        for name in self.objectives:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise UserError(f"objectives: unknown option {name!r}, {hint}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.objectives.items()
        }
        return ObjectiveConfig(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from what ``config.json`` holds, of ``SCLModel.save_pretrained`` or of transformers.

        Args:
            config_dict: its content.
            **kwargs: attributes to set to other values, and options of transformers.

        Returns:
            The configuration, or a pair with the options that it has no attribute for, as transformers has it.

        Raises:
            UserError: the content describes another model.
        """
        kind = config_dict.get("model_type") or config_dict.get("architecture") or MODEL_TYPE
        if kind != MODEL_TYPE:
            raise UserError(f"config.json: describes {kind!r}, expected a folder of SCLModel or SCLHFModel")
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written: every size, so that other defaults of another version change nothing.

        Returns:
            Plain values.
        """
        return {**super().to_diff_dict(), **{name: getattr(self, name) for name in SIZES}}


def check_untied(config: SCLHFConfig) -> None:
    """Raise if a configuration asks for tied embeddings, which the network does not have.

    Args:
        config: of a model.

    Raises:
        UserError: it does.
    """
    if getattr(config, "tie_word_embeddings", False):
        raise UserError(
            "tie_word_embeddings: got True, expected False: the decoder of SCL's MLM head has weights of its own"
        )
