"""Small videos, encoded as cameras and sites do, whose frames all differ."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

SIDE = 64


def picture(number, side=SIDE):
    """Frame ``number``: its brightness and the place of a bar say which it is; the top half is redder."""
    levels = np.full((side, side, 3), 20 + 6 * (number % 24), dtype=np.uint8)
    levels[: side // 2, :, 0] += 60
    levels[:, (4 * number) % side : (4 * number) % side + 4] = 230
    return Image.fromarray(levels)


def write_clip(path, *, count=24, codec="libx264", pts=None, options=None, format=None, pixels="yuv420p"):
    """A clip of ``count`` frames; ``pts`` gives the time of each in 1/1000 s."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width = stream.height = SIDE
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_image(picture(number))
            frame.pts = pts(number) if pts else 40 * number
            frame.time_base = Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
