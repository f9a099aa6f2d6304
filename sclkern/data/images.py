"""Decoding of image files to what an ordinary viewer shows."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torchvision.io
from PIL import Image

# Begins the message of every image that cannot be decoded.
UNDECODABLE = "the image cannot be decoded: "
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = 5  # turns from this one on exchange width and height
_ORIENTATION = 0x0112  # of EXIF
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _COLOUR_MAP = 262, 258, 339, 320  # of TIFF
# Formats whose grey of more than 8 bits Pillow scales to 16; a TIFF says its bits itself.
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
# Formats that often leave the place of alpha at zero; viewers then show the picture without it.
_ALPHA_MAY_BE_UNUSED = ("BMP", "DIB", "TGA", "ICO", "CUR")


# The markers that a JPEG begins and ends with: a file that is cut short has no last one.
_FIRST, _LAST = b"\xff\xd8", b"\xff\xd9"
# Deprecated by torchvision 0.29; without it Pillow decodes.
_decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)

Reduction = Callable[[int, int], int]
# An image, mode RGB, or its levels (H, W, 3) uint8.
Picture = Image.Image | torch.Tensor


def decode_image(data: bytes | memoryview, reduction: Reduction | None = None) -> Image.Image:
    """Decode an image file to mode RGB.

    - The EXIF orientation is applied; a broken EXIF block is overlooked.
    - Whatever is transparent is laid on white, by an alpha channel, a palette or a transparent colour.
    - More than 8 bits are reduced to the highest 8. Grey of 32 bits, of floats and of signed numbers is refused: no
      format says which of its values are black and white.
    - CMYK, YCbCr, L*a*b* and palettes become RGB; of an animation the first frame is taken.
    - Colours are those of the file: an embedded ICC profile is not applied, as in the published code.

    Args:
        data: content of a JPEG, PNG, WebP or other file that Pillow reads.
        reduction: from width and height of the picture as it is shown to 1, 2, 4 or 8, the factor by which it may be
            reduced; a JPEG in colour or grey is then decoded at that size, whatever else the file is in whole.

    Returns:
        The image, mode RGB.

    Raises:
        ValueError: The file is broken, of an unknown format, without an agreed scale of grey, or over Pillow's limit of
            pixels.
    """
    try:
        if data is None or len(data) == 0:
            raise ValueError("it is empty")
        with warnings.catch_warnings():
            # Pillow warns of what viewers overlook; with "python -W error" such a picture would be lost.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            # The first frame of an animation may be smaller than the picture.
            frame = image.tile[0][1] if image.format == "GIF" and image.tile else None
            if reduction is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
                _reduce(image, reduction)
            image.load()
            turn = _TURNS.get(_orientation(image))
            rgb = _to_rgb(image, data)
            if frame is not None and frame != (0, 0, *rgb.size):
                rgb = _surround_with_white(rgb, frame)
            return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # Pillow's plug-ins raise errors of every kind on broken files
        raise ValueError(UNDECODABLE + _reason(error, data)) from error


def decode_levels(data: bytes | memoryview, reduction: Reduction) -> torch.Tensor | None:
    """Decode an ordinary JPEG by torchvision's decoder, which takes a sixth less time than Pillow's.

    Args:
        data: content of a file.
        reduction: as of ``decode_image``.

    Returns:
        Levels (H, W, 3) uint8; None for every file that is not in colour, upright, whole, and to be decoded at its own
        size: ``decode_image`` decodes it, or says what is wrong with it.
    """
    if _decode_jpeg is None or (bytes(data[:2]), bytes(data[-2:])) != (_FIRST, _LAST):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            header = Image.open(io.BytesIO(data))
            if (header.format, header.mode, _orientation(header)) != ("JPEG", "RGB", 1) or reduction(*header.size) > 1:
                return None
            # A copy, because the decoder takes no memory that must not be written to.
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            levels = _decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB).permute(1, 2, 0)
    except Exception:  # Pillow and torchvision raise errors of every kind on broken files
        return None
    return levels


def _reduce(jpeg: Image.Image, reduction: Reduction) -> None:
    """Have a JPEG decoded at a part of its size: the decoder leaves out the frequencies that the result cannot show."""
    width, height = jpeg.size
    factor = reduction(height, width) if _orientation(jpeg) >= _ON_ITS_SIDE else reduction(width, height)
    if factor > 1:
        jpeg.draft(jpeg.mode, (width // factor, height // factor))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken block raises errors of every kind
        return 1


def _to_rgb(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    if image.format == "TIFF":
        _check_tiff(image)
        _widen_palette(image)
    key = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        samples, bits = _deep_grey(image)
        levels = (samples >> (bits - 8)).astype(np.uint8)
        if isinstance(key, int):
            levels[samples == key] = 255
        return Image.fromarray(levels).convert("RGB")
    if isinstance(key, int | tuple) and image.mode in ("1", "L", "RGB"):
        return _key_to_white(image, key, data)
    if image.has_transparency_data:
        return _lay_on_white(image)
    # ``convert`` would copy it.
    return image if image.format == "JPEG" and image.mode == "RGB" else image.convert("RGB")


def _check_tiff(image: Image.Image) -> None:
    if image.mode == "L" and _is_signed(image):
        raise _no_scale(image, "signed grey")
    is_ycbcr = image.tag_v2.get(_PHOTOMETRIC) == 6  # type: ignore[attr-defined]
    if is_ycbcr and image.mode == "RGB" and image.info.get("compression") == "raw":
        raise ValueError("this Pillow takes YCbCr without compression for RGB; install Pillow 13 or compress it")


def _widen_palette(image: Image.Image) -> None:
    """Take a TIFF's palette of 8 bits for what it is: it should have 16, of which Pillow takes the upper 8."""
    colours: tuple[int, ...] = image.tag_v2.get(_COLOUR_MAP, ())  # type: ignore[attr-defined]
    if image.mode in ("P", "PA") and 0 < max(colours, default=0) < 256:
        count = len(colours) // 3
        channels = (colours[:count], colours[count : 2 * count], colours[2 * count :])
        image.putpalette(bytes(value for colour in zip(*channels, strict=True) for value in colour))


def _surround_with_white(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    shown = Image.new("RGB", image.size, "white")
    shown.paste(image.crop(frame), frame[:2])
    return shown


def _deep_grey(image: Image.Image) -> tuple[np.ndarray, int]:
    """Unsigned samples (H, W) of a grey picture of more than 8 bits, and their bits; 0 is black."""
    if image.mode == "F":
        raise _no_scale(image, "grey of floats")
    samples = np.asarray(image)
    if image.format in _SIXTEEN_BITS:
        return samples, 16
    if image.format != "TIFF":
        raise _no_scale(image, "grey of more than 8 bits")
    bits = image.tag_v2.get(_BITS, (1,))[0]  # type: ignore[attr-defined]
    if _is_signed(image) or bits > 16:
        raise _no_scale(image, f"{'signed ' if _is_signed(image) else ''}grey of {bits} bits")
    # Pillow leaves "0 is white" as it is for more than 8 bits: the picture would be its negative.
    white_is_zero = image.tag_v2.get(_PHOTOMETRIC, 0) == 0  # type: ignore[attr-defined]
    return ((1 << bits) - 1 - samples if white_is_zero else samples), bits


def _is_signed(tiff: Image.Image) -> bool:
    return any(kind != 1 for kind in tiff.tag_v2.get(_SAMPLE_FORMAT, (1,)))  # type: ignore[attr-defined]


def _no_scale(image: Image.Image, what: str) -> ValueError:
    return ValueError(
        f"{what} in a {image.format} file has no agreed black and white, expected 8 or 16 bits without a sign; "
        "convert it"
    )


def _key_to_white(image: Image.Image, key: int | tuple[int, ...], data: bytes | memoryview) -> Image.Image:
    """A grey or RGB picture with white in place of its transparent colour, which is given in the file's own bits."""
    levels = np.array(image.convert("L") if image.mode == "1" else image)
    colour, samples = np.array(key), levels
    if image.format == "PNG" and image.mode != "1":
        bits = data[24]
        if image.mode == "RGB" and bits == 16:
            samples = 256 * levels.astype(np.int32) + _low_bytes(data)
        colour &= (1 << bits) - 1
        if bits < 8:
            colour = colour * 255 // ((1 << bits) - 1)
    same = samples == colour
    levels[same.all(-1) if levels.ndim == 3 else same] = 255
    return Image.fromarray(levels).convert("RGB")


def _low_bytes(png: bytes | memoryview) -> np.ndarray:
    """The lower bytes (H, W, 3) of a PNG of 16-bit RGB, of which Pillow gives the upper ones."""
    image = Image.open(io.BytesIO(png))
    # Read as little-endian, the upper byte of a sample is the file's lower one.
    image.tile = [(*tile[:3], "RGB;16L") for tile in image.tile]  # type: ignore[misc]
    return np.asarray(image)


def _lay_on_white(image: Image.Image) -> Image.Image:
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if image.format in _ALPHA_MAY_BE_UNUSED and not rgba.getchannel("A").getbbox():
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _reason(error: Exception, data: bytes | memoryview) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        pixels = "".join(re.findall(r"\((\d+) pixels\)", str(error)))
        return f"it unfolds to {pixels} pixels, expected {Image.MAX_IMAGE_PIXELS} at most; shrink it, or leave it out"
    if not isinstance(error, Image.UnidentifiedImageError):
        return re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or type(error).__name__
    start = bytes(data[:256])
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page"
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        return "it is XML text, such as an SVG drawing, which must be rendered first"
    if start[4:8] == b"ftyp" or start.startswith((b"\x1aE\xdf\xa3", b"RIFF")):
        return "it is a video, or a picture that this Pillow does not read; data.format=clips reads tables of videos"
    return f"Pillow reads no such file, which begins with {start[:16]!r}"
