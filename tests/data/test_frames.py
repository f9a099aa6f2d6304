"""Frames of clips: which are chosen, and that the frame of an index is the one that is shown at its place."""

import io
import itertools
import struct

import av
import numpy as np
import pytest
import torch

from clip_files import SIDE, picture, write_clip
from sclkern.data import frames
from sclkern.data.files import DataFolder
from sclkern.data.frames import FrameSampling, decode_video, read_frames

FORMS = {
    "bidirectional.mp4": {"options": {"bf": "3", "g": "12"}},
    "one_key_frame.mp4": {"options": {"bf": "2", "g": "250"}, "count": 60},
    "variable_rate.mp4": {"pts": lambda number: 7 * number * number + 100},
    "plain.mkv": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "without_times.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "ten_bits.mp4": {"pixels": "yuv420p10le"},
    "elementary.h264": {"format": "h264", "options": {"bf": "2"}},
    "transport.ts": {"format": "mpegts", "options": {"bf": "2"}},
    "single.mp4": {"count": 1},
    "animated.gif": {"codec": "gif", "pixels": "rgb8"},
}


def shown(path):
    """All frames in the order in which they are shown, decoded from the first on."""
    with av.open(str(path)) as container:
        return [np.asarray(frame.to_image().convert("RGB")) for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", FORMS)
def test_the_frame_of_an_index_is_the_one_that_is_shown_there(tmp_path, name):
    path = write_clip(tmp_path / name, **FORMS[name])
    expected = shown(path)
    assert len(expected) == FORMS[name].get("count", 24)
    for choose in (
        lambda count: list(range(count)),
        lambda count: [0, count // 3, count // 2, count - 1],
        lambda count: [count - 1, count - 1],
    ):
        with open(path, "rb") as file:
            found = decode_video(file, choose)
        wanted = choose(len(expected))
        assert len(found) == len(wanted)
        for frame, index in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(frame), expected[index])


def test_few_frames_of_a_long_clip_decode_few(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", count=600, options={"g": "25"})
    decoded = []
    original = frames._decoded

    def counted(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(frames, "_decoded", counted)
    with open(path, "rb") as file:
        assert len(decode_video(file, FrameSampling(4))) == 4
    assert len(decoded) < 110


def test_no_frame_is_decoded_twice_and_no_unwanted_one_that_no_other_needs(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "one_key_frame.mp4", count=240, options={"g": "240", "bf": "3", "b-adapt": "0"})
    decoded = []
    original = frames._decoded

    def counted(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(frames, "_decoded", counted)
    with open(path, "rb") as file:
        found = decode_video(file, lambda count: [30, 90, 150, 210])
    assert len(decoded) == len(set(decoded)) < 150
    monkeypatch.undo()
    for frame, index in zip(found, [30, 90, 150, 210], strict=True):
        np.testing.assert_array_equal(np.asarray(frame), shown(path)[index])


def test_a_clip_that_was_cut_short_gives_what_is_there(tmp_path):
    content = write_clip(tmp_path / "whole.mkv").read_bytes()
    counts = []
    found = decode_video(io.BytesIO(content[:-100]), lambda count: counts.append(count) or [0, count - 1])
    assert len(found) == 2 and 1 < counts[0] < 24


def test_a_packet_without_content_is_passed_over():
    """Theora's way to show a frame for longer; FFmpeg takes it for the end."""

    class Packet:
        def __init__(self, size, dts):
            self.size, self.dts = size, dts

        def decode(self):
            if not self.size and self.dts is not None:
                raise av.FFmpegError(22, "Invalid argument")
            return [self.dts]

    class Container:
        def demux(self, stream):
            return [Packet(5, 0), Packet(0, 1), Packet(5, 2), Packet(0, None)]

    assert list(frames._decoded(Container(), None)) == [0, 2, None]


def test_a_video_of_which_most_cannot_be_decoded_is_refused(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "whole.mp4", options={"g": "6"})
    original = frames._decoded
    for count, fine in ((4, True), (1, False), (0, False)):
        monkeypatch.setattr(frames, "_decoded", lambda *args, count=count: itertools.islice(original(*args), count))
        with open(path, "rb") as file:
            if fine:
                assert len(decode_video(file, lambda _: [0, 1, 8, 14])) == 4
            else:
                with pytest.raises(ValueError, match=f"cannot be decoded: of 4 frames only {count}"):
                    decode_video(file, lambda _: [0, 2, 8, 14])


@pytest.mark.parametrize("content", [b"", b"no video", b"\0" * 4096])
def test_what_is_no_video_is_refused(content):
    with pytest.raises(ValueError, match="the video cannot be decoded" if content else "the file is empty"):
        decode_video(io.BytesIO(content), lambda count: [0])


def test_a_picture_and_a_sound_are_no_video(tmp_path):
    content = io.BytesIO()
    picture(1).save(content, "JPEG")
    with pytest.raises(ValueError, match="the file is a picture"):
        decode_video(content, lambda count: [0])
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    with open(tmp_path / "sound.wav", "rb") as file, pytest.raises(ValueError, match="has no video stream"):
        decode_video(file, lambda count: [0])


@pytest.mark.parametrize(("angle", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_frames_are_upright(tmp_path, angle, matrix):
    """A camera that is turned writes how in the track's header; ``angle`` is clockwise."""
    path = write_clip(tmp_path / "turned.mp4")
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 0x10000 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    found = np.asarray(decode_video(io.BytesIO(bytes(content)), lambda count: [3])[0])
    expected = np.rot90(shown(path)[3], -angle // 90)
    np.testing.assert_array_equal(found, expected)


def test_the_cover_of_a_sound_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "cover.mp4"), "w") as container:
        stream = container.add_stream("mjpeg")
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_image(picture(0)).reformat(format="yuvj420p")
        frame.pts = 0
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(ValueError, match="no video stream"):
        read_frames(DataFolder(tmp_path), "cover.mp4", lambda count: [0])


def test_folders_of_frames_are_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in (0, 1, 2, 10, 11):
        picture(number).save(folder / f"clip_{number}.png")
    (folder / "notes.txt").write_text("no frame")
    counts = []
    found = read_frames(DataFolder(tmp_path), "clip/", lambda count: counts.append(count) or [1, 3, 3])
    assert counts == [5]
    for frame, number in zip(found, (1, 10, 10), strict=True):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(picture(number)))
    picture(3, side=SIDE // 2).save(folder / "clip_12.png")
    with pytest.raises(ValueError, match="several sizes, such as 32 x 32 and 64 x 64"):
        read_frames(DataFolder(tmp_path), "clip", lambda count: [0, count - 1])


@pytest.mark.parametrize(
    ("method", "count", "expected"),
    [
        ("uniform", 10, [0, 3, 6, 9]),
        ("uniform", 11, [0, 3, 6, 10]),
        ("uniform", 2, [0, 0, 0, 1]),
        ("uniform", 1, [0, 0, 0, 0]),
        ("midpoint", 100, [12, 37, 62, 87]),
        ("midpoint", 10, [0, 3, 5, 8]),
        ("midpoint", 2, [0, 0, 1, 1]),
    ],
)
def test_chosen_frames(method, count, expected):
    assert FrameSampling(4, method)(count) == expected


@pytest.mark.parametrize("count", range(2, 200, 7))
@pytest.mark.parametrize("wanted", [1, 4, 8])
def test_uniform_frames_are_those_of_linspace(count, wanted):
    assert FrameSampling(wanted)(count) == np.linspace(0, count - 1, wanted).round(9).astype(int).tolist()


def test_training_takes_one_random_frame_of_each_segment():
    sampling = FrameSampling(4, "segments")
    torch.manual_seed(1)
    drawn = torch.tensor([sampling(10) for _ in range(400)])
    for segment, (start, end) in enumerate([(0, 2), (2, 5), (5, 7), (7, 10)]):
        assert drawn[:, segment].unique().tolist() == list(range(start, end))
    torch.manual_seed(1)
    assert sampling(10) == drawn[0].tolist()
    assert sampling(1) == [0, 0, 0, 0] and sampling(3) == [0, 0, 1, 2]
