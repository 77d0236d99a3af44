"""What a clip shows, in numbers: motion, stillness, darkness, bars, blur, and a hash of its looks.

A clip is decoded once. Every frame is looked at small; bars and blur are measured on some frames of
full size.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.media.bars import FULL_FRAMES, Bars, Grey, find_bars, grey_of
from data_pipeline.media.container import open_video, read_shots
from data_pipeline.media.image import open_image
from data_pipeline.media.orientation import Orientation, orientation_of
from data_pipeline.media.picture import refuse_strange_colours

LONGER_SIDE, LEAST_SIDE = 160, 32  # of small pictures
LOOKS = 4  # frames that are hashed, spread evenly
HASH_BYTES = 8 * LOOKS
FROZEN_LEVELS, CELLS = 1.0, 8  # no cell of an 8x8 grid changes by more on average
BLACK_LEVEL, BLACK_SHARE = 25, 0.98  # as FFmpeg's blackdetect: so many pixels are so dark

NOTHING = np.empty((1, 1, 2), np.float32)  # no flow to begin with, by its size


@dataclass(frozen=True)
class Measures:
    """A clip in numbers; an image has no motion and no frozen frames."""

    motion: float | None  # mean length of the optical flow, in % of the height per second
    frozen: float | None  # share of frames that show what the one before showed
    black: float  # share of frames that are black
    brightness: float  # mean luma, 0 to 1
    sharpness: float  # variance of the Laplacian of luma in 0 to 255, at full size; low is blurred
    bars: Bars
    hash: bytes  # near-duplicates differ in few of its bits


def measure_media(media: bytes, kind: str, deadline_seconds: float = math.inf) -> Measures:
    """The measures of a video or an image; DataError where it cannot be read to its end."""
    if kind == "image":
        picture = np.array(open_image(media).convert("L"))
        seen = _Seen([0] * LOOKS)
        seen.see_full(picture)
        height, width = _small_size(*picture.shape)
        seen.see_small(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))
        return seen.measures()
    video = open_video(media)
    count = len(video.timeline.times)
    seen = _Seen([count * (2 * look + 1) // (2 * LOOKS) for look in range(LOOKS)])
    stride, upright = -(-count // FULL_FRAMES), Orientation()
    for number, shot in enumerate(read_shots(video, [(0.0, math.inf)], deadline_seconds)):
        frame, before = shot.frame, seen.seconds
        if number % stride == 0:
            refuse_strange_colours(frame)
            upright = orientation_of(frame, video.look)
            seen.see_full(upright.turn(grey_of(frame, frame.height, frame.width)))
        small = upright.turn(grey_of(frame, *_small_size(frame.height, frame.width)))
        passed = None if shot.is_new or before is None else shot.seconds - before
        seen.see_small(small, passed)
        seen.seconds = shot.seconds
    if not seen.frames:
        raise DataError("holds no frame")
    return seen.measures()


def hash_picture(small: Grey) -> bytes:
    """A hash of 64 bits: which of the lowest frequencies are above their median."""
    square = cv2.resize(small, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(square)[:8, :8].ravel()
    return np.packbits(low > np.median(low[1:])).tobytes()


class _Seen:
    """What was seen of a clip so far; `looks`: which frames are hashed."""

    def __init__(self, looks: list[int]) -> None:
        self.looks, self.hashes = looks, dict[int, bytes]()
        self.frames = self.frozen = self.black = 0
        self.seconds: float | None = None
        self.light = self.moved = self.passed = 0.0
        self.sharp: list[float] = []
        self.last: Grey | None = None
        self.lightest: Grey | None = None
        self.is_video = False

    def see_full(self, picture: Grey) -> None:
        """A frame in full size."""
        picture = np.ascontiguousarray(picture)
        deviation = cv2.meanStdDev(cv2.Laplacian(picture, cv2.CV_16S))[1]
        self.sharp.append(float(deviation[0, 0]) ** 2)
        if self.lightest is None or self.lightest.shape != picture.shape:
            self.lightest = picture.copy()
        else:
            np.maximum(self.lightest, picture, out=self.lightest)

    def see_small(self, picture: Grey, passed: float | None = None) -> None:
        """The next frame, small, and how many seconds after the one that leads up to it."""
        picture = np.ascontiguousarray(picture)
        if self.frames in self.looks:
            self.hashes[self.frames] = hash_picture(picture)
        self.frames += 1
        self.light += float(picture.mean()) / 255
        self.black += int((picture <= BLACK_LEVEL).mean() >= BLACK_SHARE)
        if passed is not None and self.last is not None and self.last.shape == picture.shape:
            self.is_video = True
            self.passed += passed
            if _is_same(self.last, picture):
                self.frozen += 1
            else:
                flow = _flow().calc(self.last, picture, NOTHING)
                self.moved += cv2.mean(cv2.magnitude(*cv2.split(flow)))[0] / picture.shape[0]
        self.last = picture

    def measures(self) -> Measures:
        """All of it."""
        assert self.lightest is not None
        assert self.last is not None
        late = hash_picture(self.last)  # where there are fewer frames than were told
        speed = 100 * self.moved / self.passed if self.passed else 0.0
        return Measures(
            motion=_rounded(speed) if self.is_video else None,
            frozen=_rounded(self.frozen / self.frames) if self.is_video else None,
            black=_rounded(self.black / self.frames),
            brightness=_rounded(self.light / self.frames),
            sharpness=_rounded(float(np.median(self.sharp))),
            bars=find_bars(self.lightest),
            hash=b"".join(self.hashes.get(look, late) for look in self.looks),
        )


def _is_same(one: Grey, other: Grey) -> bool:
    change = cv2.absdiff(one, other).astype(np.float32)
    cells = cv2.resize(change, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    return float(cells.max()) <= FROZEN_LEVELS


@lru_cache(maxsize=1)
def _flow() -> cv2.DISOpticalFlow:
    """Dense inverse search (Kroeger et al., 2016)."""
    cv2.setNumThreads(1)
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)


def _small_size(height: int, width: int) -> tuple[int, int]:
    scale = LONGER_SIDE / max(height, width)
    return max(LEAST_SIDE, round(height * scale)), max(LEAST_SIDE, round(width * scale))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
