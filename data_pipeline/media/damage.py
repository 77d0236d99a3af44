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
from data_pipeline.media.codec_headers import allows_gaps, holds_zeros, is_wavefront, length_bytes

# libvpx notices where its arithmetic decoder lost the thread, FFmpeg's own does not; and it alone
# reads the transparency of a WebM.
DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# A decoder of VP8 that lost the thread reads past the end, and shows what it finds there.
TAIL = bytes(range(0x95, 0xF5, 3))
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
    except av.FFmpegError:
        _refuse_damage(said)
        raise
    finally:
        capture.__exit__(None, None, None)
        av.logging.set_level(QUIET)
    _refuse_damage(said)


def _refuse_damage(said: list[tuple[int, str, str]]) -> None:
    for severity, _, message in said:
        if message.startswith(GAP):
            raise DataError("is damaged: frames are missing")
        if severity <= QUIET and not message.startswith(HARMLESS):
            raise DataError(f"is damaged: {' '.join(message.split())[:70]}") from None


class Decoder:
    """The decoder of a stream, by which frames that it mended are refused."""

    def __init__(self, stream: VideoStream):
        told = stream.codec_context
        self.context, self._twin, self._tail = told, None, b""
        if told.name in DECODERS:
            self.context = _another(told)
        extradata = told.extradata or b""
        self._length_bytes = length_bytes(told.name, extradata)
        self._listens_for_gaps = told.name == "h264" and not allows_gaps(extradata)
        # The rows of a wavefront are found one after the other, or by their places: whole frames
        # come out the same.
        if told.name == "hevc" and is_wavefront(extradata):
            self._twin = _another(told)
            self._twin.thread_type, self._twin.thread_count = "SLICE", 2
        if told.name == "vp8":
            self._twin, self._tail = _another(told), TAIL
        self.context.thread_type, self.context.thread_count = "NONE", 1

    def decode(self, packet: Packet, *, follows: bool) -> list[av.VideoFrame]:
        """The frames that come with a packet, or with an empty one at the end; `follows`: it is the
        one after that before."""
        if self._length_bytes and holds_zeros(bytes(packet), self._length_bytes):
            raise DataError("is damaged: zeros in the middle")
        with listening(INNERMOST if self._listens_for_gaps and follows else QUIET):
            frames = self.context.decode(packet)
        if any(frame.is_corrupt for frame in frames):
            raise DataError("is damaged: frames were mended")
        if self._twin:
            others = self._twin.decode(_lengthened(packet, self._tail))
            if len(frames) != len(others) or not all(map(_same, frames, others)):
                raise DataError("is damaged: its frames come out in two ways")
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


def _lengthened(packet: Packet, tail: bytes) -> Packet:
    """A packet with more bytes behind it."""
    if not tail or not packet.size:
        return packet
    longer = Packet(bytes(packet) + tail)
    longer.pts, longer.dts, longer.time_base = packet.pts, packet.dts, packet.time_base
    return longer


def _same(one: av.VideoFrame, other: av.VideoFrame) -> bool:
    return one.pts == other.pts and all(
        np.array_equal(_pixels(plane), _pixels(twin))
        for plane, twin in zip(one.planes, other.planes, strict=False)  # alpha stands alone
    )


def _pixels(plane: VideoPlane) -> np.ndarray:
    """The bytes of a plane without what pads its lines; two of a sample deeper than 8 bits."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width * (plane.line_size // plane.width)]
