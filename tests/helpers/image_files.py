"""Image files written byte by byte, so that a test knows what is in them without Pillow's word for it."""

import struct
import zlib

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


# First column and row, and the steps of both, of the passes of an interlaced PNG.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(samples, bits=8, colour=GREY, *, interlaced=False, **chunks):
    """A PNG of samples (H, W) or (H, W, channels); further chunks by name, such as ``tRNS=b"..."``, before the data."""
    samples = np.asarray(samples)
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    passes = [samples[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [samples]
    body = b"".join(b"\0" + _packed(row.reshape(-1), bits) for part in passes for row in part if row.size)
    extra = [_chunk(name.encode(), content) for name, content in chunks.items()]
    parts = [_chunk(b"IHDR", header), *extra, _chunk(b"IDAT", zlib.compress(body)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _packed(row, bits):
    if bits >= 8:
        return row.astype(f">u{bits // 8}").tobytes()
    spread = (row[:, None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1)).tobytes()


def tiff(samples, photometric=1, *, order="<", bits=None, sample_format=None, extra=None, content=None, **tags):
    """An uncompressed TIFF of samples (H, W) or (H, W, channels); further tags of SHORT as ``tag_123=4`` or a list."""
    samples = np.asarray(samples)
    height, width = samples.shape[:2]
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    bits = bits or 8 * samples.itemsize
    data = content if content is not None else samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    short = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric], 277: [channels]}
    short |= {278: [height], **{int(name[4:]): np.ravel(value).tolist() for name, value in tags.items()}}
    if sample_format:
        short[339] = [sample_format] * channels
    if extra is not None:
        short[338] = [extra]
    entries, tail = [], b""
    end = 8 + 2 + 12 * (len(short) + 2) + 4
    for tag, values in sorted({**short, 273: None, 279: [len(data)]}.items()):
        if values is None:
            entries.append((tag, 4, 1, None))
            continue
        kind = 4 if tag == 279 else 3
        packed = struct.pack(f"{order}{len(values)}{'I' if kind == 4 else 'H'}", *values)
        if len(packed) > 4:
            packed, tail = struct.pack(order + "I", end + len(tail)), tail + packed
        entries.append((tag, kind, len(values), packed.ljust(4, b"\0")))
    offset = struct.pack(order + "I", end + len(tail))
    directory = b"".join(
        struct.pack(order + "HHI", tag, kind, n) + (value or offset) for tag, kind, n, value in entries
    )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return start + struct.pack(order + "H", len(entries)) + directory + bytes(4) + tail + data


def netpbm(kind, samples, maximum):
    """A binary PGM ("P5") or PPM ("P6") of samples from 0 to ``maximum``."""
    samples = np.asarray(samples)
    body = samples.astype(">u2" if maximum > 255 else "u1").tobytes()
    return f"{kind} {samples.shape[1]} {samples.shape[0]} {maximum}\n".encode() + body


def bitmap(samples, *, header=40):
    """A BMP of 32 bits a pixel, samples (H, W, 4) as blue, green, red and the fourth byte."""
    samples = np.asarray(samples, np.uint8)
    height, width = samples.shape[:2]
    fields = struct.pack("<IiiHHIIiiII", header, width, height, 1, 32, 0 if header == 40 else 3, 0, 0, 0, 0, 0)
    if header > 40:
        fields += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    fields = fields.ljust(header, b"\0")
    body = samples[::-1].tobytes()
    return b"BM" + struct.pack("<IHHI", 14 + len(fields) + len(body), 0, 0, 14 + len(fields)) + fields + body


def targa(samples):
    """A TGA of 32 bits a pixel, samples (H, W, 4) as blue, green, red and the fourth byte."""
    samples = np.asarray(samples, np.uint8)
    height, width = samples.shape[:2]
    return struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 32, 0x20) + samples.tobytes()
