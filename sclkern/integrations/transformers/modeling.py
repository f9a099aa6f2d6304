"""SCL as a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from sclkern.errors import UserError
from sclkern.integrations.transformers.config import SCLHFConfig, check_untied
from sclkern.model import SCLModel
from sclkern.models.captions import check_captions, first_token
from sclkern.ops.dispatch import may_read

_NAMES = "input_ids", "attention_mask"


@dataclass
class SCLOutput(ModelOutput):
    """Output of ``SCLHFModel``.

    Attributes:
        loss: 0-d, the weighted sum of the losses of the recipe; None without a loss.
        logits_per_image: (N, M) float32, cosine of N images and M texts over the temperature of the contrast; None in
            training mode with a loss, which does not need it.
        logits_per_text: (M, N), its transpose.
        text_embeds: (M, projection_dim) float32, projected and normalised; None where there are no logits.
        image_embeds: (N, projection_dim) float32, likewise.
        losses: 0-d by objective, each before its weight; None without a loss.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class SCLHFModel(PreTrainedModel):
    """SCL for transformers: similarities as CLIP has them, and in training the losses of SCL's recipe.

    >>> model = SCLHFModel.from_pretrained(folder)  # of SCLModel.save_pretrained, sclkern export, or of this class
    >>> model(**SCLProcessor.from_pretrained(folder)(images=pictures, text=captions)).logits_per_image

    The network is ``model.model``, an ``SCLModel``; ``model.model.step`` and ``model.model.set_backend`` choose how it
    is executed. Folders of this class load by ``SCLModel.from_pretrained`` too. Embeddings are not resized or tied.

    Args:
        config: the sizes and the objectives.

    Attributes:
        config_class: ``SCLHFConfig``.
        base_model_prefix: name of the network.
        main_input_name: the input that every call has.
        supports_gradient_checkpointing: each block is recomputed, or none.
        accepts_loss_kwargs: False, so that ``Trainer`` divides the loss by the micro-batches of a step.
    """

    config_class = SCLHFConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: SCLHFConfig) -> None:
        check_untied(config)
        if (asked := config._attn_implementation) not in (None, "eager"):
            raise UserError(
                f"attn_implementation: got {asked!r}, expected none: SCL takes its own kernels where they run; "
                "model.model.set_backend chooses others, such as 'sdpa'"
            )
        super().__init__(config)
        self.model = SCLModel(config.network_config(), config.objective_config())
        self.gradient_checkpointing = False
        self._drawn = not self.model.modality.weight.is_meta
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give the weights that no file has the values of a new network; those of a network just drawn stay."""
        lacking = [name for name, p in self.model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
        if self._drawn or not lacking:
            return
        with torch.device("cpu"):
            new = SCLModel(self.config.network_config()).state_dict()
        for name in lacking:
            self.model.get_parameter(name).copy_(new[name])

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        if every_n_layers != 1:
            raise UserError(f"every_n_layers: got {every_n_layers}, expected 1: SCL checkpoints every block, or none")
        self.model.step = replace(self.model.step, checkpoint_blocks=enable)
        self.gradient_checkpointing = enable

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding of the text encoder."""
        return self.model.text.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused, see ``resize_token_embeddings``."""
        raise _no_other_vocabulary()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Embedding:
        """Refused unless the number stays: the MLM head, the targets of every mask and the mask token belong to the
        vocabulary.

        Args:
            new_num_tokens: rows of the token embedding.
            *args: ignored.
            **options: ignored.

        Returns:
            The token embedding.

        Raises:
            UserError: another number of rows.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise _no_other_vocabulary()
        return self.get_input_embeddings()

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode texts.

        Args:
            input_ids: (B, L) int64, at most ``max_text_len`` tokens.
            attention_mask: (B, L) bool or 0/1, True or 1 = a token, with padding anywhere; None takes what is
                ``pad_token_id`` as padding.
            token_type_ids: (B, L), zeros.
            return_dict: False returns a tuple.

        Returns:
            ``last_hidden_state`` (B, L, width), undefined in padding, and ``pooler_output`` (B, projection_dim), which
            the contrast compares; not normalised.

        Raises:
            UserError: the model has no head of the contrast.
            TypeError: see ``sclkern.models.captions.check_captions``.
            ValueError: likewise; or token types other than zero.
        """
        self._check_contrast()
        mask = self._text_mask(input_ids, attention_mask, token_type_ids)
        hidden = self.model.encode_text(input_ids, mask)
        return self._features(hidden, self.model.text_projection, first_token(hidden, mask), return_dict)

    def get_image_features(self, pixel_values: Tensor, return_dict: bool | None = None) -> Any:
        """Encode images or clips.

        Args:
            pixel_values: (B, 3, S, S), or (B, F, 3, S, S) of clips, normalised floats as ``SCLProcessor`` makes them.
            return_dict: False returns a tuple.

        Returns:
            ``last_hidden_state`` (B, F + F * P, width), the CLS tokens of the F frames first, and ``pooler_output``
            (B, projection_dim), which the contrast compares; not normalised.

        Raises:
            UserError: the model has no head of the contrast.
            TypeError: not a tensor of floats.
            ValueError: another shape.
        """
        self._check_contrast()
        encoded = self.model.encode_image(self._pixels(pixel_values))
        return self._features(encoded.tokens, self.model.project_image, encoded.cls, return_dict)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_id: Tensor | None = None,
        false_image: Tensor | None = None,
        return_loss: bool | None = None,
        seed: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compare images with texts, and compute the losses of the recipe.

        A loss needs pairs: as many texts as images, text i of image i; two or more where ITM's false images are those
        of other rows (the default); and the heads of the recipe. Under torch.distributed its negatives are those of all
        ranks, and DDP's mean is the gradient of the whole batch.

        Args:
            input_ids: (M, L) int64, at most ``max_text_len`` tokens.
            pixel_values: (N, 3, S, S), or (N, F, 3, S, S) of clips, normalised floats as ``SCLProcessor`` makes them.
            attention_mask: (M, L) bool or 0/1, True or 1 = a token, with padding anywhere; None takes what is
                ``pad_token_id`` as padding.
            token_type_ids: (M, L), zeros.
            image_id: (N,) int64, for the loss: equal where rows show the same picture; None: each shows its own.
            false_image: like ``pixel_values``, for a loss with ``itm_negatives`` "dataset".
            return_loss: whether to compute the loss; None does so in training mode.
            seed: of the masks of the loss; None draws one from torch's generator, as dropout does.
            output_attentions: refused if True.
            output_hidden_states: refused if True.
            return_dict: False returns a tuple.

        Returns:
            The ``SCLOutput``: without a loss the logits, in training mode with a loss the losses, else both.

        Raises:
            UserError: texts or images are not given, the model lacks a head, or attention maps or hidden states are
                asked for.
            TypeError: not tensors, or of another dtype.
            ValueError: another shape, or a batch that no loss takes; the message says what was expected.
        """
        self._check_options(output_attentions, output_hidden_states)
        if input_ids is None or pixel_values is None:
            lacking = "input_ids" if input_ids is None else "pixel_values"
            raise UserError(
                f"{lacking}: got None, expected texts and images; get_text_features and get_image_features encode one"
            )
        mask = self._text_mask(input_ids, attention_mask, token_type_ids)
        pixels = self._pixels(pixel_values)
        wants_loss = self.training if return_loss is None else return_loss
        found: dict[str, Any] = {}
        if wants_loss:
            if len(input_ids) != len(pixels):
                raise ValueError(
                    f"return_loss: got {len(input_ids)} texts and {len(pixels)} images, expected one text of each "
                    "image, in order; return_loss=False compares any number"
                )
            batch: dict[str, Tensor] = {"image": pixels, "text_ids": input_ids, "text_mask": mask}
            if image_id is not None:
                batch["image_id"] = image_id
            if false_image is not None:
                batch["false_image"] = self._pixels(false_image, "false_image")
            losses = self.model(batch, seed=seed)
            found = {"loss": losses.total, "losses": losses.losses}
        if not (wants_loss and self.training):
            found |= self._logits(input_ids, mask, pixels)
        output = SCLOutput(**found)
        return output.to_tuple() if self._as_tuple(return_dict) else output

    def _logits(self, input_ids: Tensor, mask: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        text = normalize(self.get_text_features(input_ids, mask, return_dict=True).pooler_output.float(), dim=-1)
        image = normalize(self.get_image_features(pixels, return_dict=True).pooler_output.float(), dim=-1)
        with torch.autocast(image.device.type, enabled=False):
            per_image = image @ text.T / self.model.contrast_temperature().float()
        return {
            "logits_per_image": per_image,
            "logits_per_text": per_image.T,
            "text_embeds": text,
            "image_embeds": image,
        }

    def _features(
        self, hidden: Tensor, project: Callable[[Tensor], Tensor], cls: Tensor, return_dict: bool | None
    ) -> Any:
        # As retrieval does: in the weights' own dtype whatever autocast says.
        with torch.autocast(cls.device.type, enabled=False):
            projected = project(cls.to(self.model.modality.weight.dtype))
        output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=projected)
        return output.to_tuple() if self._as_tuple(return_dict) else output

    def _as_tuple(self, return_dict: bool | None) -> bool:
        return (self.config.return_dict if return_dict is None else return_dict) is False

    def _check_contrast(self) -> None:
        if "itc" not in self.model.config.heads:
            raise UserError(
                f"heads: the model has {list(self.model.config.heads)}, features and logits need 'itc' too; load a "
                "model that was trained with ITC"
            )

    def _check_options(self, output_attentions: bool | None, output_hidden_states: bool | None) -> None:
        for name, asked, remedy in (
            ("output_attentions", output_attentions, "`sclkern visualize` shows what words attend to"),
            ("output_hidden_states", output_hidden_states, "take get_text_features(...).last_hidden_state"),
        ):
            if asked or (asked is None and getattr(self.config, name, False)):
                raise UserError(f"{name}: got True, expected False: SCLHFModel returns none; {remedy}")

    def _text_mask(self, ids: Tensor, mask: Tensor | None, types: Tensor | None) -> Tensor:
        if mask is None and isinstance(ids, Tensor):
            mask = ids.ne(self.model.config.pad_id)
        found = check_captions(ids, mask, self.model.config, _NAMES).mask
        if types is not None and may_read(types) and bool(types.any()):
            raise ValueError(
                f"token_type_ids: got {types.max().item()}, expected 0 everywhere, as each text is one; leave them out"
            )
        return found

    def _pixels(self, pixels: Tensor, name: str = "pixel_values") -> Tensor:
        size = self.model.config.image_size
        remedy = "SCLProcessor.from_pretrained(FOLDER), of the model's folder, makes them"
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise TypeError(f"{name}: got {kind}, expected a tensor of normalised floats; {remedy}")
        if pixels.ndim not in (4, 5) or tuple(pixels.shape[-3:]) != (3, size, size):
            raise ValueError(
                f"{name}: got shape {tuple(pixels.shape)}, expected (B, 3, S, S), or (B, F, 3, S, S) of clips, with S "
                f"= {size} (image_size of the model); {remedy}"
            )
        return pixels.to(self.model.modality.weight.dtype)


def _no_other_vocabulary() -> UserError:
    return UserError(
        "resize_token_embeddings: SCL's vocabulary is fixed, because the MLM head and the mask token belong to it; "
        "train a model with SCLConfig(vocab_size=...) and a tokenizer of that size"
    )
