"""Finding damage: decoders go on over it, so what they log and mark is read here, and never shown.

What is found in which codec stands in docs/data.md, by `benchmarks/damage.py`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.plane import VideoPlane
from av.video.stream import VideoStream

from data_pipeline.errors import DataError
from data_pipeline.media.bits import allows_gaps, is_wavefront

# libvpx notices where its arithmetic decoder lost the thread, FFmpeg's own does not; and it alone
# reads the transparency of a WebM.
DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
HARMLESS = ("mmco: unref short failure", "unable to decode APP fields", "SEI type")
GAP = "Frame num gap"  # of H.264; told with the decoder's innermost thoughts only
QUIET, INNERMOST = av.logging.ERROR, av.logging.DEBUG

# So messages of FFmpeg reach Python, each of them, and no terminal from there.
av.logging.set_level(QUIET)
av.logging.set_skip_repeated(False)
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False


@contextmanager
def listening(level: int = QUIET) -> Iterator[None]:
    """DataError if FFmpeg tells of damage, in this thread and meanwhile."""
    capture = av.logging.Capture()
    av.logging.set_level(level)
    said = capture.__enter__()
    try:
        yield
    finally:
        capture.__exit__(None, None, None)
        av.logging.set_level(QUIET)
    for severity, _, message in said:
        if message.startswith(GAP):
            raise DataError("is damaged (frames are missing)")
        if severity <= QUIET and not message.startswith(HARMLESS):
            raise DataError(f"is damaged ({' '.join(message.split())[:70]})")


class Decoder:
    """The decoder of a stream, by which frames that it mended are refused."""

    def __init__(self, stream: VideoStream):
        told = stream.codec_context
        self.context, self._twin = told, None
        if told.name in DECODERS:
            self.context = _another(told)
        self._listens_for_gaps = told.name == "h264" and not allows_gaps(told.extradata or b"")
        # The rows of a wavefront are found one after the other, or by their places: whole frames
        # come out the same.
        if told.name == "hevc" and is_wavefront(told.extradata or b""):
            self._twin = _another(told)
            self._twin.thread_type, self._twin.thread_count = "SLICE", 2
        self.context.thread_type, self.context.thread_count = "NONE", 1

    def decode(self, packet: Packet, *, follows: bool) -> list[av.VideoFrame]:
        """The frames that come with a packet, or with an empty one at the end; `follows`: it is the
        one after that before."""
        with listening(INNERMOST if self._listens_for_gaps and follows else QUIET):
            frames = self.context.decode(packet)
        if any(frame.is_corrupt for frame in frames):
            raise DataError("is damaged (frames were mended)")
        if self._twin:
            others = self._twin.decode(packet)
            same = len(frames) == len(others) and all(map(_same, frames, others))
            if not same:
                raise DataError("is damaged (rows of a frame begin elsewhere than told)")
        return frames

    def flush(self) -> None:
        """Forget what came, to go on at another key frame."""
        for context in (self.context, self._twin):
            if context:
                context.flush_buffers()


def _another(told: VideoCodecContext) -> VideoCodecContext:
    """A second decoder of what a stream's own is for."""
    context = av.CodecContext.create(DECODERS.get(told.name, told.name), "r")
    assert isinstance(context, VideoCodecContext)
    context.extradata = told.extradata
    context.color_range, context.colorspace = told.color_range, told.colorspace
    context.color_primaries, context.color_trc = told.color_primaries, told.color_trc
    return context


def _same(one: av.VideoFrame, other: av.VideoFrame) -> bool:
    return one.pts == other.pts and all(
        np.array_equal(_pixels(plane), _pixels(twin))
        for plane, twin in zip(one.planes, other.planes, strict=True)
    )


def _pixels(plane: VideoPlane) -> np.ndarray:
    """The bytes of a plane without what pads its lines; two of a sample deeper than 8 bits."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width * (plane.line_size // plane.width)]
