"""Pictures and texts as SCL's evaluation makes them, for transformers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from sclkern.data.images import Picture, decode_image
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import CLIP_MEAN, CLIP_STD, Decoding, ImageTransform, build_transform
from sclkern.errors import UserError
from sclkern.integrations.transformers.config import SCLHFConfig

_PROCESSOR = "processor_config.json"
# What says where files are, of from_pretrained's options.
_PLACES = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Above this, ``model_max_length`` of a tokenizer says that nobody set it.
_NO_LENGTH = 1_000_000
# Modes of Pillow that PNG keeps.
_KEPT = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


class SCLImageProcessor(BaseImageProcessor):
    """Pictures as retrieval of SCL takes them: transform "clip_test", resized to the square, the same to the bit.

    Args:
        size: S, side in pixels: an int, or ``{"height": S, "width": S}``.
        decoding: "fast" or "published", see ``sclkern.data.transforms.build_transform``.
        **options: transformers' own.

    Attributes:
        model_input_names: ``pixel_values``.

    Raises:
        UserError: a size that is not square or not positive.
        ValueError: ``decoding`` is neither.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers declares it so)

    def __init__(self, size: int | dict[str, int] = 288, decoding: Decoding = "fast", **options: Any) -> None:
        super().__init__(**options)
        side = size if isinstance(size, int) else size.get("height")
        if not isinstance(side, int) or (not isinstance(size, int) and size != {"height": side, "width": side}):
            raise UserError(f"size: got {size}, expected the side of a square in pixels, as image_size of the model")
        build_transform("clip_test", side, decoding=decoding)
        self.size = {"height": side, "width": side}
        self.decoding = decoding
        # For readers of the file: the transform has them.
        self.image_mean, self.image_std = list(CLIP_MEAN), list(CLIP_STD)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **options: Any) -> BatchFeature:
        """Make the pixel values of pictures.

        Args:
            images: one or a sequence of: a PIL image, a path, the bytes of a file, or levels (H, W, 3) or (3, H, W)
                uint8 as array or tensor. Of a large JPEG, a path and bytes give what retrieval has of the file, which
                decodes it at a part of its size; a PIL image is whole.
            return_tensors: "pt", or None, torch; "np", numpy.
            **options: refused.

        Returns:
            ``pixel_values`` (B, 3, S, S) float32.

        Raises:
            UserError: something else, a file that is not there, or an option.
            ValueError: a picture that cannot be decoded.
        """
        if options:
            raise UserError(
                f"{next(iter(options))}: unknown option, expected images and return_tensors; the model takes pictures "
                "of one size, scaled and normalised in one way"
            )
        transform = build_transform("clip_test", self.size["height"], decoding=self.decoding)
        single = isinstance(images, Image.Image | str | Path | bytes | bytearray | memoryview) or (
            isinstance(images, np.ndarray | Tensor) and images.ndim == 3
        )
        given: Sequence[Any] = [images] if single else list(images)
        if not given:
            raise UserError("images: got none, expected one or more")
        pixels = torch.stack([transform(_picture(image, transform, row)) for row, image in enumerate(given)])
        return BatchFeature({"pixel_values": _as(pixels, return_tensors)})


class SCLProcessor(ProcessorMixin):
    """Pictures and texts for ``SCLHFModel``, as ``CLIPProcessor`` is called.

    >>> processor = SCLProcessor.from_pretrained(folder)
    >>> batch = processor(images=[picture], text=["a dog", "a cat"])

    A text is data: what spells a special token, such as ``<mask>``, is text. The tokenizer is set to that too, and to
    the longest text of the model, for whoever calls it by itself.

    Args:
        image_processor: of the model's image size.
        tokenizer: of the model; a fast one, see ``sclkern.data.tokenizer.CaptionTokenizer``.
        max_text_len: tokens of the longest text; None takes ``model_max_length`` of the tokenizer.

    Raises:
        UserError: a tokenizer that is not of RoBERTa's style, or no length.
    """

    def __init__(
        self, image_processor: SCLImageProcessor, tokenizer: PreTrainedTokenizerBase, max_text_len: int | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self._captions = CaptionTokenizer(tokenizer)
        self.max_text_len = tokenizer.model_max_length if max_text_len is None else max_text_len
        if self.max_text_len > _NO_LENGTH:
            raise UserError("max_text_len: the tokenizer has no model_max_length, expected that of the model; pass it")
        settings = {
            "model_max_length": self.max_text_len,
            "model_input_names": ["input_ids", "attention_mask"],
            "split_special_tokens": True,
        }
        for name, value in settings.items():
            setattr(tokenizer, name, value)
            tokenizer.init_kwargs[name] = value

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> SCLProcessor:
        """Load what ``save_pretrained`` wrote, or make the processor of a model's folder.

        Args:
            pretrained_model_name_or_path: a folder of this class, ``SCLModel.save_pretrained`` or ``sclkern
                export``, or a name on the Hugging Face hub.
            tokenizer: of a model that has none beside it: a folder, a name, "demo" or the tokenizer itself.
            **options: of transformers, such as ``revision`` and ``local_files_only``.

        Returns:
            The processor.

        Raises:
            UserError: there is no tokenizer, or it is not the model's.
        """
        where = str(pretrained_model_name_or_path)
        places = {name: options[name] for name in _PLACES if name in options}

        def held(name: str) -> bool:
            found = cached_file(where, name, **places, _raise_exceptions_for_missing_entries=False)
            return found is not None

        if tokenizer is None and held(_PROCESSOR):
            return super().from_pretrained(where, **options)
        config = SCLHFConfig.from_pretrained(where, **places)
        if tokenizer is None:
            if not held("tokenizer.json"):
                raise UserError(
                    f"{where}: has no tokenizer.json, expected the tokenizer of the model beside it; name it: "
                    "SCLProcessor.from_pretrained(FOLDER, tokenizer=...), such as 'roberta-base' of a published model"
                )
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **places)
        elif isinstance(tokenizer, str | Path):
            found = CaptionTokenizer.from_pretrained(tokenizer).tokenizer
        else:
            found = tokenizer
        processor = cls(SCLImageProcessor(config.image_size), found, config.max_text_len)
        for key in ("vocab_size", "pad_id", "mask_id", "bos_id", "eos_id"):
            expected, value = getattr(config, key), getattr(processor._captions, key)
            if value != expected:
                raise UserError(
                    f"tokenizer: has {key} {value}, the model of {where} was trained with {expected}; give the "
                    "tokenizer that it was trained with"
                )
        return processor

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        truncation: bool = True,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: as ``SCLImageProcessor.preprocess`` takes them; None: none.
            text: one or a list; None: none.
            return_tensors: "pt", or None, torch; "np", numpy.
            padding: True or "longest", to the longest text; "max_length".
            truncation: True cuts a longer text before ``</s>``; False refuses it.
            max_length: tokens of the longest text, ``<s>`` and ``</s>`` included; None takes that of the model.

        Returns:
            ``input_ids`` (M, L) and ``attention_mask`` (M, L) int64, 1 = a token; ``pixel_values`` (N, 3, S, S)
            float32.

        Raises:
            UserError: neither is given, a text without a token, a text that is too long, or an unknown value.
            ValueError: a picture that cannot be decoded.
        """
        if images is None and text is None:
            raise UserError("images, text: got neither, expected one or both")
        longest = self.max_text_len if max_length is None else max_length
        if longest > self.max_text_len:
            raise UserError(
                f"max_length: got {longest}, expected at most max_text_len {self.max_text_len} of the model"
            )
        if padding not in (True, "longest", "max_length"):
            raise UserError(f"padding: got {padding!r}, expected True, 'longest' or 'max_length'")
        data: dict[str, Any] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, list | tuple):
                raise UserError(
                    f"text: got {type(text).__name__}, expected a str or a list of them (images come first)"
                )
            ids, mask = self._captions(texts, longest if truncation else _NO_LENGTH)
            if ids.shape[1] > longest:
                raise UserError(
                    f"text: got {ids.shape[1]} tokens, expected at most {longest}; truncation=True cuts longer texts"
                )
            if padding == "max_length":
                missing = (0, longest - ids.shape[1])
                ids = torch.nn.functional.pad(ids, missing, value=self._captions.pad_id)
                mask = torch.nn.functional.pad(mask, missing)
            data |= {"input_ids": _as(ids, return_tensors), "attention_mask": _as(mask.long(), return_tensors)}
        if images is not None:
            data |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(data)


def _as(values: Tensor, return_tensors: str | None) -> Any:
    if return_tensors not in (None, "pt", "np"):
        raise UserError(f"return_tensors: got {return_tensors!r}, expected 'pt' or 'np'")
    return values.numpy() if return_tensors == "np" else values


def _picture(image: Any, transform: ImageTransform, row: int) -> Picture:
    """What the transform takes, of one of the images."""
    if isinstance(image, str | Path):
        try:
            image = Path(image).expanduser().read_bytes()
        except OSError as error:
            raise UserError(
                f"images: {str(image)!r:.200} (row {row}) cannot be read ({error.strerror}), expected a PIL image, or "
                "the path of a picture"
            ) from error
    if isinstance(image, bytes | bytearray | memoryview):
        return transform.decode(bytes(image))
    if isinstance(image, Image.Image):
        return _upright_rgb(image)
    if isinstance(image, np.ndarray | Tensor):
        levels = torch.as_tensor(image)
        if levels.dtype == torch.uint8 and levels.ndim == 3 and 3 in (levels.shape[0], levels.shape[2]):
            if levels.shape[2] != 3:
                levels = levels.permute(1, 2, 0)
            return _upright_rgb(Image.fromarray(levels.contiguous().numpy()))
        got = f"{levels.dtype} of shape {tuple(levels.shape)}"
    else:
        got = type(image).__name__
    raise UserError(
        f"images: got {got} (row {row}), expected a PIL image, a path, the bytes of a file, or levels (H, W, 3) or (3, "
        "H, W) uint8"
    )


def _upright_rgb(image: Image.Image) -> Image.Image:
    """An image as ``decode_image`` makes it of a file: upright, what is transparent laid on white, RGB."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a broken block of EXIF raises errors of every kind, and viewers overlook it
        image = image.copy()
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode not in _KEPT:
        return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return decode_image(file.getvalue())
