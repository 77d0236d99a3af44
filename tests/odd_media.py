"""Media as other programs make them, by plain calls of FFmpeg and not by the code under test."""

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np

BARS = 10  # bit b of a frame's number is the b-th bar from the left, white where it is 1
QUADRANTS = np.array([[(220, 30, 30), (30, 220, 30)], [(30, 30, 220), (220, 220, 220)]], np.uint8)


def numbered(number: int, height: int = 48, width: int = 80) -> np.ndarray:
    """A picture that tells its number."""
    bars = np.arange(width) * BARS // width
    row = (number >> bars & 1).astype(np.uint8) * 255
    return np.broadcast_to(row[None, :, None], (height, width, 3))


def number_of(picture: np.ndarray) -> int:
    """The number that a picture tells."""
    centers = (2 * np.arange(BARS) + 1) * picture.shape[1] // (2 * BARS)
    is_white = picture[picture.shape[0] // 2, centers].mean(axis=1) > 128
    return int((is_white << np.arange(BARS)).sum())


def numbers_of(clip: np.ndarray) -> list[int]:
    """The numbers that a clip's frames tell."""
    return [number_of(picture) for picture in clip]


def quadrants(height: int = 48, width: int = 80) -> np.ndarray:
    """Red, green, blue and white, from the upper left."""
    return QUADRANTS.repeat(height // 2, 0).repeat(width // 2, 1)


def corners_of(picture: np.ndarray) -> np.ndarray:
    """The colours in the middle of a picture's quadrants."""
    rows, columns = (np.array([side // 4, 3 * side // 4]) for side in picture.shape[:2])
    return picture[np.ix_(rows, columns)].astype(int)


@contextmanager
def schedule_kept() -> Iterator[None]:
    """SVT-AV1 leaves a process of root with the highest real-time priority, beside which nothing
    else gets a core, its own children included."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@schedule_kept()
def write_video(
    pictures: Sequence[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    pixels: str = "yuv420p",
    rate: Fraction | int = 24,
    gop: int = 12,
    bframes: int | None = None,
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    base: Fraction | None = None,
    tags: dict[str, int] | None = None,
    source: str = "rgb24",
    whole: str | None = None,
    prepare=None,
) -> bytes:
    """A file; `times` in ticks of `base`; `prepare` changes each frame before it is encoded, which
    until then is in the format `whole`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=muxing or {}) as muxer:
        stream = muxer.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        if base:
            stream.codec_context.time_base = base
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=source)
            frame = frame.reformat(format=whole or pixels, threads=1)
            frame.pts = times[number] if times else number
            frame.time_base = base or 1 / Fraction(rate)
            muxer.mux(stream.encode(prepare(frame) if prepare else frame))
        muxer.mux(stream.encode())
    return buffer.getvalue()


def remux(media: bytes, container: str, change, muxing: dict[str, str] | None = None) -> bytes:
    """The same packets in another file; `change(number, packet)` may alter one, or drop it by
    returning False."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(media)) as source:
        stream = source.streams.video[0]
        with av.open(buffer, "w", format=container, options=muxing or {}) as muxer:
            copy = muxer.add_stream_from_template(stream)
            packets = (packet for packet in source.demux(stream) if packet.size)
            for number, packet in enumerate(packets):
                if change(number, packet) is not False:
                    packet.stream = copy
                    muxer.mux(packet)
    return buffer.getvalue()


def with_matrix(media: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 with another display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y."""
    a, b, c, d = (value << 16 for value in matrix)
    at = media.index(b"tkhd") + 4 + 40
    content = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return media[:at] + content + media[at + len(content) :]
