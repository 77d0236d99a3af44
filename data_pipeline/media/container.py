"""The video of a file in memory: what its packets tell, and its frames, decoded forward.

No container's index is trusted. All packets are read once for their times, which costs little
beside decoding. For frames they are read again, decoded from the last key frame before what is
wanted on, and skipped where the next that is wanted begins after another key frame.
"""

import io
import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.stream import VideoStream

from data_pipeline.errors import DataError, NotWanted
from data_pipeline.media.damage import Decoder, listening
from data_pipeline.media.interlace import Deinterlacer
from data_pipeline.media.timeline import Stamp, Timeline, timeline_of

MAX_PIXELS = 8192 * 8192  # of one frame; larger ones are refused unread
# Playlists and other containers that name further files are no input.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,gif"
NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


@dataclass(frozen=True, eq=False)
class Video:
    """The video stream of a file."""

    media: bytes
    stream: int
    timeline: Timeline
    aspect: float  # width of a stored pixel / its height
    look: av.VideoFrame  # the first frame that can be had


@dataclass(frozen=True)
class Shot:
    """A decoded frame, and when it is shown; new: what was shown before does not lead up to it,
    as after a gap or a part that was left out."""

    seconds: float
    frame: av.VideoFrame
    is_new: bool = False


class _WrongEntry(Exception):
    """What a container calls a key frame is none."""


@contextmanager
def open_container(media: bytes, **options: Any) -> Iterator[InputContainer]:
    """A container in memory; DataError for whatever of it cannot be read meanwhile."""
    try:
        with av.open(
            io.BytesIO(media), "r", options={"format_whitelist": CONTAINERS}, **options
        ) as container:
            yield container
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be decoded ({getattr(error, 'strerror', error)})") from None


def choose_streams(container: InputContainer) -> list[VideoStream]:
    """The streams that may be the video, pictures of covers being none; NotWanted if none may."""
    streams = [stream for stream in container.streams.video if not stream.disposition & NO_VIDEO]
    if not streams:
        raise NotWanted("holds no video")
    streams = [stream for stream in streams if stream.codec_context]
    if not streams:
        raise NotWanted("is of a codec that is not known")
    for stream in streams:
        if stream.width * stream.height > MAX_PIXELS:
            raise NotWanted(f"has frames too large to read: {stream.width}x{stream.height}")
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return streams


def open_video(media: bytes) -> Video:
    """The video of a file, up to where it can be read."""
    with open_container(media) as container:
        streams = choose_streams(container)
        stamps: dict[int, list[Stamp]] = {stream.index: [] for stream in streams}
        looks: dict[int, av.VideoFrame] = {}
        problem: Exception = DataError("holds no frame")
        try:
            for packet in read_packets(container, streams):
                index = packet.stream.index
                if packet.size:
                    times, marks = (packet.pts, packet.dts), (packet.is_keyframe, packet.is_discard)
                    stamps[index].append(Stamp(*times, *marks))
                if index not in looks:
                    with suppress(av.FFmpegError, IndexError):  # told when the frames are read
                        looks[index] = packet.decode()[0]
        except (av.FFmpegError, DataError) as error:
            problem = error
        moving = [stream for stream in streams if len(stamps[stream.index]) > 1] or streams
        stream = max(moving, key=lambda stream: bool(stream.disposition & Disposition.default))
        if stream.index not in looks:
            raise problem
        rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        base = stream.time_base or Fraction(1, av.time_base)
        # An AVI tells the order of decoding only.
        knows_shown = container.format.name != "avi"
        timeline = timeline_of(stamps[stream.index], base, rates, knows_shown=knows_shown)
        aspect = float(stream.sample_aspect_ratio or 1)
        return Video(media, stream.index, timeline, aspect, looks[stream.index])


def read_packets(container: InputContainer, streams: Sequence[VideoStream]) -> Iterator[Packet]:
    """Whole packets; each stream ends with an empty one, which makes its decoder end."""
    packets = container.demux(*streams)
    while True:
        with listening():
            packet = next(packets, None)
        if packet is None:
            return
        if packet.is_corrupt:
            raise DataError("is damaged: a packet is cut")
        is_end = packet.pts is None and packet.dts is None
        if packet.size or is_end:  # empty packets between others repeat a frame
            yield packet


def read_shots(
    video: Video, wanted: Sequence[tuple[float, float]], deadline_seconds: float = math.inf
) -> Iterator[Shot]:
    """The frames of some (start, end), in order of time and each once.

    Of each, those from a key frame before its start to the first at its end or after it come.
    """
    deadline, last = time.monotonic() + deadline_seconds, -math.inf
    entries = video.timeline.entries
    while True:
        try:
            for shot in _forward(video, sorted(wanted), entries):
                if time.monotonic() > deadline:
                    raise DataError(f"took more than {deadline_seconds:g} seconds to decode")
                if shot.seconds > last:
                    last = shot.seconds
                    yield shot
            return
        except _WrongEntry:
            entries = entries[:1]


def _forward(
    video: Video, wanted: list[tuple[float, float]], entries: list[tuple[int, float]]
) -> Iterator[Shot]:
    """The frames of some (start, end), in one reading of the packets."""
    line, spans = video.timeline, iter(wanted)
    with open_container(video.media) as container:
        stream = next(one for one in container.streams.video if one.index == video.stream)
        decoder, deinterlacer = Decoder(stream), Deinterlacer()
        start, end = next(spans)
        entry, begins = _entry_before(entries, start)
        number, turn, last, is_first, follows = -1, 0, -math.inf, True, False
        for packet in read_packets(container, [stream]):
            number += 1 if packet.size else 0
            if number < entry:
                continue
            is_entry = number == entry and packet.size > 0
            is_later = entry != entries[0][0]
            if is_entry:
                decoder.flush()
                deinterlacer, is_first, follows = Deinterlacer(), True, False
            elif line.is_stamped and packet.size and seconds_of(packet, line) < begins:
                follows = False  # shown before the key frame, and made of what is before it
                continue
            try:
                decoded = decoder.decode(packet, follows=follows)
            except (av.FFmpegError, DataError):
                if is_entry and is_later:
                    raise _WrongEntry from None
                raise
            follows = True
            for frame in deinterlacer.mend(decoded, is_end=not packet.size):
                at = seconds_of(frame, line) if line.is_stamped else line.turn_time(turn)
                turn += 1
                if is_first and is_later and not _begins(frame, at, begins):
                    raise _WrongEntry
                if at < last:
                    raise NotWanted(f"goes back in time: after {last:.4g} seconds")
                yield Shot(at, frame, is_new=is_first or at - last > line.gap_seconds)
                is_first, last = False, at
                while at >= end:
                    following = next(spans, None)
                    if following is None:
                        return
                    start, end = following
                    if (later := _entry_before(entries, start))[0] > number:
                        entry, begins = later
                        break
                if number < entry:
                    break


def seconds_of(timed: Packet | av.VideoFrame, line: Timeline) -> float:
    """When a packet or a frame is shown, after the first."""
    if timed.pts is None or timed.time_base is None:
        raise DataError("has frames without a time")
    return float(timed.pts * timed.time_base - line.zero)


def _entry_before(entries: list[tuple[int, float]], seconds: float) -> tuple[int, float]:
    """The key frame to begin at for what is shown at a time."""
    return entries[max(0, bisect_right(entries, seconds, key=lambda entry: entry[1]) - 1)]


def _begins(frame: av.VideoFrame, at: float, begins: float) -> bool:
    """Whether the first frame that came is the key frame that was sought."""
    is_whole = frame.pict_type not in (PictureType.P, PictureType.B)
    return is_whole and math.isclose(at, begins, abs_tol=1e-4)
