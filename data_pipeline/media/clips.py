"""Clips of any media at a wanted size: upright, in the right colours, at the right times.

A video is decoded once, however many clips are wanted of it, and each is handed out as soon as its
last frame came. A `DataError` says in a few words why media is damaged, a `NotWanted` why it is
whole but no use; callers add where it is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import av
import numpy as np
from PIL import Image, ImageOps

from data_pipeline.errors import NotWanted
from data_pipeline.media.bars import Bars
from data_pipeline.media.container import Shot, Video, open_video, read_shots
from data_pipeline.media.image import open_image
from data_pipeline.media.orientation import Orientation, Picture, orientation_of
from data_pipeline.media.picture import fitted_picture, picture_of, shown_size
from data_pipeline.media.scenes import mark_scenes
from data_pipeline.media.timeline import Timeline
from data_pipeline.media.tones import to_sdr
from data_pipeline.pyramid import Clip, repeat_still

Size = tuple[int, int, int]
Cut = Literal["none", "length", "scenes"]
NO_BARS = Bars()


@dataclass(frozen=True)
class Span:
    """A part of a video, in seconds after its first frame."""

    start: float = 0.0
    end: float = math.inf


WHOLE = Span()


@dataclass(frozen=True)
class Media:
    """A clip at a wanted size, and what it was before; an image has 0 fps."""

    clip: Clip
    fps: float
    original_height: int
    original_width: int
    original_fps: float
    start_seconds: float = 0.0


@dataclass(frozen=True)
class Probe:
    """What media is, sides as shown; an image has 0 fps and seconds. Frames are counted, not
    decoded, but for the first."""

    frames: int
    fps: float
    height: int
    width: int
    seconds: float
    times: Sequence[float] | np.ndarray = field(default=(), compare=False)  # of frames

    def time_of(self, frame: int) -> float:
        """When a frame is shown, by its number; of one behind the end, when it would be."""
        behind = frame - len(self.times)
        if behind < 0:
            return float(self.times[frame])
        return self.seconds + (behind / self.fps if self.fps else 0.0)


def probe(media: bytes, kind: str, bars: Bars = NO_BARS) -> Probe:
    """What media is, by all of its packets and its first frame, without bars."""
    if kind == "image":
        image = open_image(media)
        height, width = image.height - bars.top - bars.bottom, image.width - bars.left - bars.right
        return Probe(1, 0.0, height, width, 0.0)
    video = open_video(media)
    line = video.timeline
    upright = orientation_of(video.look)
    height, width = shown_size(video.look, upright, video.aspect)
    if bars != NO_BARS:
        height, width = upright.turn_size((video.look.height, video.look.width))
        height, width = height - bars.top - bars.bottom, width - bars.left - bars.right
        width = max(1, round(width * _shown_aspect(upright, video.aspect)))
    return Probe(len(line.times), line.fps, height, width, line.seconds, line.times)


def read_clip(
    media: bytes,
    kind: str,
    size: Size,
    *,
    fps: float | None = None,
    start_seconds: float = 0.0,
    deadline_seconds: float = math.inf,
) -> Media:
    """A clip of media that begins at a start; of an image, a still one."""
    if kind == "image":
        return read_still(media, size)
    spans = [Span(start_seconds)]
    found = read_clips(media, size, fps=fps, spans=spans, deadline_seconds=deadline_seconds)
    for _, clip in found:
        if isinstance(clip, NotWanted):
            raise clip
        return clip
    raise NotWanted(f"is too short: 0 of {size[0]} frames")


def read_still(media: bytes, size: Size, bars: Bars = NO_BARS) -> Media:
    """An image as a still clip, covering the size and cropped around the centre."""
    image = open_image(media)
    if bars != NO_BARS:
        image = Image.fromarray(bars.cut(np.array(image)))
    fitted = ImageOps.fit(image, (size[2], size[1]), Image.Resampling.BICUBIC)
    return Media(repeat_still(np.array(fitted), size[0]), 0.0, image.height, image.width, 0.0)


def read_clips(
    media: bytes,
    size: Size,
    *,
    fps: float | None = None,
    spans: Sequence[Span] = (WHOLE,),
    cut: Cut = "none",
    bars: Bars = NO_BARS,
    tone_map: bool = False,
    deadline_seconds: float = math.inf,
) -> Iterator[tuple[int, Media | NotWanted]]:
    """Clips of some spans of a video, each with its span's number and as soon as it is there: one
    where a span starts, or as many as fit, of which none may span a change of scene. Of a span
    without any, why.

    Frames are those shown at the times 0, 1/fps, 2/fps, ... after a clip's start (no fps: the
    video's own); pixels without bars cover the size and are cropped around the centre. HDR is not
    wanted, or brought to SDR where tones are to be mapped.
    """
    video = open_video(media)
    line = video.timeline
    if fps and line.fps < 0.98 * fps:
        raise NotWanted(f"has fewer than {fps:g} frames per second: {line.fps:.4g}")
    step = 1 / (fps or line.fps)
    cuttings = [_Cutting(span, size[0], step, cut == "none", line) for span in spans]
    wanted = [(cutting.span.start, cutting.end_seconds) for cutting in cuttings]
    shots = read_shots(video, wanted, deadline_seconds)
    if cut == "scenes":
        shots = mark_scenes(shots, line.fps)
    for shot in shots:
        shown = _Shown(shot, video, bars, size[1:], tone_map)
        for number, cutting in enumerate(cuttings):
            yield from ((number, found) for found in cutting.see(shown))
    for number, cutting in enumerate(cuttings):
        yield from ((number, found) for found in cutting.finish())


@dataclass(frozen=True, eq=False)
class _Shown:
    """A shot, and its picture once anything asks for it."""

    shot: Shot
    video: Video
    bars: Bars
    size: tuple[int, int]
    tone_map: bool

    @cached_property
    def look(self) -> tuple[av.VideoFrame, Orientation, float]:
        """The frame, how it is turned upright, and the aspect of its pixels; upright where it has
        bars, and without them."""
        frame, aspect = self.shot.frame, self.video.aspect
        upright = orientation_of(frame, self.video.look)
        if self.tone_map:
            frame = to_sdr(frame)
        if self.bars == NO_BARS:
            return frame, upright, aspect
        picture = self.bars.cut(picture_of(frame, upright))
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        return frame, Orientation(), _shown_aspect(upright, aspect)

    @cached_property
    def picture(self) -> Picture:
        return fitted_picture(*self.look, self.size)

    @property
    def sides(self) -> tuple[int, int]:
        return shown_size(*self.look)


@dataclass(eq=False)
class _Cutting:
    """The clips of one span, while the frames of its video pass."""

    span: Span
    frames: int
    step: float  # between frames of a clip, in seconds
    is_single: bool
    line: Timeline
    taken: list[Picture] = field(default_factory=list)
    last: _Shown | None = None
    clips: int = 0
    is_done: bool = False

    def __post_init__(self) -> None:
        self.start = self.span.start
        self.slack = 0.25 / self.line.fps  # absorbs rounded time stamps

    @property
    def end_seconds(self) -> float:
        """When the last clip must be over."""
        only = self.span.start + self.frames * self.step if self.is_single else math.inf
        return min(self.span.end, only)

    @property
    def due(self) -> float:
        """When the next frame of the clip is shown."""
        return self.start + len(self.taken) * self.step

    @property
    def fits(self) -> bool:
        """Whether the clip ends within its span."""
        return self.start + self.frames * self.step <= self.span.end + self.slack

    def see(self, shown: _Shown) -> Iterator[Media | NotWanted]:
        """The clips that are whole once this frame is here, or why there is none."""
        at = shown.shot.seconds
        before = self.last.shot.seconds if self.last else at
        is_gap = at - before > self.line.gap_seconds
        yield from self._take(until=before + 1 / self.line.fps if is_gap else at)
        if shown.shot.is_new and not self.is_single:
            self.start = max(self.span.start, at)
            self.taken.clear()
        elif is_gap and self.fits and not self.is_done and self.due + self.slack < at:
            self.is_done = True
            yield NotWanted(f"has a gap in time: {at - before:.4g} s after {before:.4g} s")
        self.last = shown

    def finish(self) -> Iterator[Media | NotWanted]:
        """The clips that the last frame makes whole, or why there is none."""
        if self.last:
            yield from self._take(until=self.last.shot.seconds + 1 / self.line.fps)
        if self.clips or self.is_done:
            return
        seconds = max(0.0, min(self.span.end, self.line.seconds) - self.span.start)
        if self.is_single:
            there = math.floor(seconds / self.step + 0.25)
            yield NotWanted(f"is too short: {there} of {self.frames} frames")
        else:
            yield NotWanted(f"shorter than one clip: {seconds:g} seconds")

    def _take(self, *, until: float) -> Iterator[Media]:
        """The clips that are whole by what is shown until then."""
        shown = self.last
        while shown and self.fits and not self.is_done and self.due + self.slack < until:
            self.taken.append(shown.picture)
            if len(self.taken) == self.frames:
                clip, start, self.start = np.stack(self.taken), self.start, self.due
                self.taken.clear()
                self.clips += 1
                self.is_done = self.is_single
                sides, rates = shown.sides, (1 / self.step, self.line.fps)
                yield Media(clip, rates[0], *sides, rates[1], start)


def _shown_aspect(upright: Orientation, aspect: float) -> float:
    """The aspect of pixels once they are turned."""
    return 1 / aspect if upright.is_transposed else aspect
