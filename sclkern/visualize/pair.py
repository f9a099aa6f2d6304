"""A picture or a clip with its caption, as a model takes them: refused where the model would see something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sclkern.data.files import DataFolder
from sclkern.data.frames import FrameSampling, read_frames
from sclkern.data.images import decode_image
from sclkern.data.text import one_line, read_caption
from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.data.transforms import build_transform
from sclkern.errors import UserError
from sclkern.models import SCLConfig

WHOLE_TEXT = "whole text"
# Longer than any caption that a model takes.
_UNCUT = 1 << 20


@dataclass(frozen=True)
class Pair:
    """A picture or a clip with its caption.

    Attributes:
        caption: the text.
        ids: (Lt,) int64, its tokens, ``<s>`` and ``</s>`` included.
        words: W names with the positions of their tokens in ``ids``; the first stands for the whole text, and is
            ``<s>``, its CLS.
        frames: F pictures, mode RGB, of one size; one of a picture.
        pixels: (3, S, S) of a picture, (F, 3, S, S) of a clip, normalised float32.
    """

    caption: str
    ids: Tensor
    words: list[tuple[str, list[int]]]
    frames: list[Image.Image]
    pixels: Tensor


def read_pair(
    config: SCLConfig, tokenizer: CaptionTokenizer, picture: str | Path, caption: str, num_frames: int | None = None
) -> Pair:
    """Read a picture or a clip and tokenize its caption.

    Args:
        config: of the model.
        tokenizer: the model's.
        picture: an image file; of a clip a video file, or a folder of frames.
        caption: the text.
        num_frames: F, frames of a clip, equally spaced from the first to the last; None reads a picture.

    Returns:
        The pair.

    Raises:
        UserError: the caption is no text or would be cut; the file is missing, cannot be decoded or is smaller than a
            patch; the model does not take so many frames.
    """
    ids = _tokenize(config, tokenizer, caption)
    words = [(WHOLE_TEXT, [0]), *tokenizer.words(ids.tolist())]
    path = Path(picture).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file, expected {'a picture' if num_frames is None else 'a clip'}")
    frames = [_read_picture(path)] if num_frames is None else _read_clip(config, path, num_frames)
    if min(frames[0].size) < config.patch_size:
        raise UserError(
            f"{path}: is {frames[0].width} x {frames[0].height} pixels, smaller than a patch ({config.patch_size}); "
            "give a larger picture"
        )
    transform = build_transform("clip_test", config.image_size)
    pixels = torch.stack([transform(frame) for frame in frames])
    return Pair(caption, ids, words, frames, pixels[0] if num_frames is None else pixels)


def _tokenize(config: SCLConfig, tokenizer: CaptionTokenizer, caption: str) -> Tensor:
    try:
        ids, _ = tokenizer([read_caption(caption)], _UNCUT)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"caption: got {one_line(str(caption), 60)!r}, but {error}; give a text") from error
    if ids.shape[1] > config.max_text_len:
        raise UserError(
            f"caption: has {ids.shape[1]} tokens, <s> and </s> included, expected at most {config.max_text_len} "
            "(max_text_len of the model), and would be cut; shorten it"
        )
    return ids[0]


def _read_picture(path: Path) -> Image.Image:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a picture; of a clip, add --frames N")
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a picture") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; give a JPEG, PNG, WebP or the like, or of a clip add --frames N") from error


def _read_clip(config: SCLConfig, path: Path, num_frames: int) -> list[Image.Image]:
    if not config.max_frames:
        raise UserError(
            f"--frames: got {num_frames}, but the model is one of images alone (max_frames 0); give a picture without "
            "--frames, or a model of clips"
        )
    if not 1 <= num_frames <= config.max_frames:
        raise UserError(f"--frames: got {num_frames}, expected 1 to {config.max_frames} (max_frames of the model)")
    # What the user names may be a link; names within the data may not lead out of it.
    path = path.resolve()
    try:
        return read_frames(DataFolder(path.parent), path.name, FrameSampling(num_frames))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}; give a video, or a folder of frames") from error
