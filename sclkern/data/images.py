"""Decoding of image files."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps


def decode_image(data: bytes | memoryview) -> Image.Image:
    """Decode an image file to mode RGB.

    The EXIF orientation is applied, transparency is laid on white, and the first frame of an animation is taken.

    Args:
        data: content of a JPEG, PNG, WebP or other file that Pillow reads.

    Returns:
        The image, mode RGB.

    Raises:
        ValueError: The file is broken, of an unknown format, or over Pillow's limit of pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        elif image.mode.startswith("I;16"):
            # convert() would clip 16-bit grey at 255, that is, to white.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow's plug-ins raise errors of every kind on broken files
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))
        raise ValueError(f"the image cannot be decoded: {reason}") from error
