"""When the frames of a video are shown, by its packets."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from jaxtyping import Float64

from data_pipeline.errors import DataError, NotWanted

GAP_SECONDS, GAP_FRAMES = 0.5, 4  # a frame that lasts longer than both is a gap


@dataclass(frozen=True)
class Stamp:
    """What one packet tells, in ticks; hidden: an edit list cuts its frame off."""

    shown: int | None
    decoded: int | None
    is_key: bool
    is_hidden: bool


@dataclass(frozen=True, eq=False)
class Timeline:
    """Times in seconds after the first frame."""

    zero: Fraction  # what the first frame is stamped, in seconds
    times: Float64[np.ndarray, " frames"]
    entries: list[tuple[int, float]]  # key frames: which packet, when
    is_stamped: bool  # else a frame's time is that of its turn
    fps: float

    @property
    def seconds(self) -> float:
        """How long it all plays, the last frame being shown no longer than others."""
        return float(self.times[-1]) + 1 / self.fps

    @property
    def gap_seconds(self) -> float:
        """A frame that lasts longer is a gap."""
        return max(GAP_SECONDS, GAP_FRAMES / self.fps)

    def turn_time(self, turn: int) -> float:
        """When the frame comes whose turn it is."""
        more = max(0, turn + 1 - len(self.times))
        return float(self.times[turn - more]) + more / self.fps


def timeline_of(
    stamps: Sequence[Stamp], base: Fraction, stated: Sequence[float], *, knows_shown: bool
) -> Timeline:
    """Of a stream's packets in their order, ticks of `base` seconds and the rates that a container
    states; `knows_shown`: the container tells when frames are shown, not just decoded."""
    first = next((number for number, stamp in enumerate(stamps) if stamp.is_key), 0)
    seen = [stamp for stamp in stamps[first:] if not stamp.is_hidden]
    shown = [stamp.shown for stamp in seen if stamp.shown is not None]
    decoded = [stamp.decoded for stamp in seen if stamp.decoded is not None]
    is_stamped = knows_shown and len(set(shown)) == len(seen)
    if is_stamped:
        # What is shown before the first key frame is made of what there was before it.
        begin = shown[0] if seen and seen[0] is stamps[first] else min(shown, default=0)
        ticks = sorted({tick for tick in shown if tick >= begin})
    elif len(set(decoded)) == len(seen):
        ticks = sorted(decoded)
    else:
        ticks, base = list(range(len(seen))), 1 / Fraction(next(iter(stated), 1))
    if not ticks:
        raise DataError("holds no frame")
    times = (np.array(ticks) - ticks[0]) * float(base)
    fps = true_rate(times, stated)
    if fps <= 0:
        raise NotWanted("has no frame rate")
    entries = [(first, 0.0)]
    if is_stamped:
        entries = [
            (number, ((stamp.shown or 0) - ticks[0]) * float(base))
            for number, stamp in enumerate(stamps)
            if number == first or (stamp.is_key and not stamp.is_hidden)
        ]
    for (_, one), (_, other) in pairwise(entries):
        if other < one:
            raise NotWanted(f"goes back in time: after {one:.4g} seconds")
    return Timeline(ticks[0] * base, times, entries, is_stamped, fps)


def true_rate(times: Float64[np.ndarray, " frames"], stated: Sequence[float]) -> float:
    """Frames per second, whatever single frames last; what is stated if it says as much.

    The mean of the steps that are near the usual one: a last frame that is held, a gap, frames that
    were dropped do not count, and rounded time stamps or fields pulled down even out.
    """
    steps = np.diff(times)
    if not len(steps):
        return next(iter(stated), 0.0)
    usual = np.median(steps)
    near = steps[(steps >= 0.4 * usual) & (steps <= 1.6 * usual)]
    measured = len(near) / float(near.sum())
    # By either rate, every frame has its place to a quarter of a frame.
    same = (rate for rate in stated if abs(len(near) * (measured / rate - 1)) < 0.25)
    return next(same, measured)
