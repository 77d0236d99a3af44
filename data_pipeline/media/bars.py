"""Black bars at the edges of a clip: found where pixels stay dark throughout, and cut off.

White and blurred bars are not found, nor bars that text is drawn on.
"""

import math
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation
from jaxtyping import UInt8

from data_pipeline.errors import DataError
from data_pipeline.media.container import open_video, read_shots
from data_pipeline.media.image import open_image
from data_pipeline.media.orientation import Picture, orientation_of
from data_pipeline.media.picture import over_white

Grey = UInt8[np.ndarray, "height width"]  # full range: 0 is black, 255 is white

FAST_RESIZE = Interpolation.AREA | Interpolation.BITEXACT  # to a few levels
FULL_FRAMES = 16  # about as many are looked at
BAR_LEVEL, BAR_EDGE = 20, 8  # rows of a bar are so dark at most, and end by such a step


@dataclass(frozen=True)
class Bars:
    """Rows and columns of black at the edges, in pixels as shown."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def cut(self, picture: Picture) -> Picture:
        """A picture without them."""
        height, width = picture.shape[:2]
        rows, columns = slice(self.top, height - self.bottom), slice(self.left, width - self.right)
        return np.ascontiguousarray(picture[rows, columns])


def media_bars(media: bytes, kind: str, deadline_seconds: float = math.inf) -> Bars:
    """The bars of an image, or those that all looked-at frames of a video have."""
    if kind == "image":
        return find_bars(np.array(open_image(media).convert("L")))
    video = open_video(media)
    times = video.timeline.times
    wanted = [(at, at) for at in times[:: -(-len(times) // FULL_FRAMES)].tolist()]
    lightest: Grey | None = None
    due = iter(at for at, _ in wanted)
    after = next(due)
    for shot in read_shots(video, wanted, deadline_seconds):
        if shot.seconds < after:
            continue
        while after <= shot.seconds:
            after = next(due, math.inf)
        upright = orientation_of(shot.frame, video.look)
        picture = upright.turn(grey_of(shot.frame, shot.frame.height, shot.frame.width))
        if lightest is None or lightest.shape != picture.shape:
            lightest = picture.copy()
        np.maximum(lightest, picture, out=lightest)
    if lightest is None:
        raise DataError("holds no frame")
    return find_bars(lightest)


def find_bars(lightest: Grey) -> Bars:
    """The bars of a clip, of whose frames each pixel is the lightest."""
    height, width = lightest.shape
    left = right = top = bottom = 0
    for _ in range(2):  # bars on all sides darken the means of each other
        top, bottom = _edges(lightest[:, left : width - right].mean(1))
        left, right = _edges(lightest[top : height - bottom].mean(0))
    return Bars(top, bottom, left, right)


def grey_of(frame: av.VideoFrame, height: int, width: int) -> Grey:
    """The luma of a frame as it is shown, at a size."""
    shown = over_white(frame).reformat(
        width=width,
        height=height,
        format="gray",
        dst_color_range=ColorRange.JPEG,
        interpolation=FAST_RESIZE,
        threads=1,
    )
    return shown.to_ndarray()


def _edges(profile: np.ndarray) -> tuple[int, int]:
    """How many entries are of a bar, at either end; of what is dark throughout, none."""
    light = np.flatnonzero(profile > BAR_LEVEL)
    if not len(light):
        return 0, 0
    first, last = int(light[0]), len(profile) - 1 - int(light[-1])
    return _depth(profile, first), _depth(profile[::-1], last)


def _depth(profile: np.ndarray, first: int) -> int:
    """A bar ends at once; what gets light by and by is a dark picture."""
    return first if first and profile[first] - profile[first - 1] >= BAR_EDGE else 0
