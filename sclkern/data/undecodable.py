"""Images that cannot be used: counted, logged once each, and an error when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from PIL import Image

from sclkern.data.images import UNDECODABLE, Picture
from sclkern.data.source import ClipSource
from sclkern.data.text import one_line
from sclkern.errors import UserError

_log = logging.getLogger("sclkern.data")
_P = TypeVar("_P", bound=Picture)
Decode = Callable[[bytes], Picture]
# Only a file that is broken as a whole has so many broken images in a row.
MAX_IN_A_ROW = 100


class Pictures(Protocol):
    """Pictures by their number: what is read of a ``PairSource``, or of the table of a task."""

    def image(self, image: int) -> Image.Image:
        """As in ``PairSource``."""


class _Named(Protocol):
    def image_name(self, image: int) -> str: ...


def undecodable_limit(num_images: int) -> int:
    """Images of a source that may be undecodable: 1 %, and one in any case, as no single image may stop a run."""
    return max(1, num_images // 100)


def none_decodable(source: _Named, reasons: Mapping[int, str]) -> UserError:
    """The error of images in a row none of which can be used, by number, the first one first."""
    image, reason = next(iter(reasons.items()))
    return UserError(
        f"{len(reasons)} images in a row cannot be decoded, the first is {one_line(source.image_name(image), 200)} "
        f"({reason}), expected JPEG, PNG or another format of Pillow; write or convert the data again"
    )


def read_image(source: Pictures, image: int, min_size: int) -> Image.Image:
    """An image of a source that a model can take.

    Args:
        source: of the image.
        image: image index.
        min_size: least height and width in pixels: the side of a patch.

    Returns:
        The image, mode RGB.

    Raises:
        ValueError: The image cannot be used: the source raises an error, or it is too small. The message is the reason.
    """
    return _checked(lambda: [source.image(image)], min_size)[0]


def read_picture(source: Pictures, image: int, min_size: int, decode: Decode | None) -> Picture:
    """As ``read_image``, decoded as a transform takes it.

    Args:
        source: of the image.
        image: image index.
        min_size: as of ``read_image``.
        decode: that of ``ImageTransform``; without effect where it is None, or the source has no ``image_bytes``.

    Returns:
        The picture.

    Raises:
        ValueError: The image cannot be used, as of ``read_image``.
    """
    encoded = getattr(source, "image_bytes", None)
    if decode is None or encoded is None:
        return read_image(source, image, min_size)
    return _checked(lambda: [decode(encoded(image))], min_size)[0]


def read_clip(
    source: ClipSource, image: int, min_size: int, choose: Callable[[int], Sequence[int]]
) -> list[Image.Image]:
    """Frames of a clip that a model can take.

    Args:
        source: pairs of clips.
        image: index of the clip.
        min_size: as of ``read_image``.
        choose: maps the number of frames to the ascending indices of those to read.

    Returns:
        The frames, mode RGB.

    Raises:
        ValueError: The clip cannot be used, as of ``read_image``.
    """
    return _checked(lambda: source.frames(image, choose), min_size)


def _checked(read: Callable[[], list[_P]], min_size: int) -> list[_P]:
    try:
        images = read()
        for decoded in images:
            if isinstance(decoded, torch.Tensor):
                height, width, _ = decoded.shape
            elif decoded.mode != "RGB":
                raise ValueError(f"its mode is {decoded.mode}, expected RGB; a reader decodes with decode_image")
            else:
                width, height = decoded.size
            if min(width, height) < min_size:
                raise ValueError(f"the image is {width} x {height} pixels, smaller than a patch ({min_size})")
    except Exception as error:  # Pillow and readers of other formats raise errors of every kind on one bad file
        reason = one_line(str(error).removeprefix(UNDECODABLE), 200)
        raise ValueError(reason or type(error).__name__) from error
    return images


class UndecodableImages:
    """Distinct images of a source that cannot be used; each is logged once to ``sclkern.data``, with the reason.

    Up to 1 % of the images may be undecodable, and one in any case: a single bad image stops no run, however small the
    source is.

    Args:
        num_images: Number of images of the source.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        """Distinct undecodable images so far."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Whether the image of this name is among them."""
        return name in self._names

    def add(self, reasons: Mapping[str, str]) -> None:
        """Count images.

        Args:
            reasons: Reason by ``image_name``; images counted before are not counted again.

        Raises:
            UserError: More than 1 % of the images are undecodable, and more than one.
        """
        for name, reason in reasons.items():
            if name not in self._names:
                self._names[name] = reason
                _log.warning("skipped an image that cannot be decoded: %s (%s)", one_line(name, 200), reason)
        if len(self) > undecodable_limit(self.num_images):
            name, reason = next(iter(self._names.items()))
            raise UserError(
                f"{len(self)} of {self.num_images} images cannot be decoded, expected 1 % at most, or one; the first "
                f"is {one_line(name, 200)}{reason and f' ({reason})'}; repair them and --resume, or remove "
                "them and start in another folder"
            )

    def state_dict(self) -> dict[str, list[str]]:
        """The names, in the order they were met; plain texts, although a reader may take them from a numpy array."""
        return {"names": [str(name) for name in self._names]}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Take over the names of ``state_dict`` without logging them again."""
        self._names = dict.fromkeys(state["names"], "")
