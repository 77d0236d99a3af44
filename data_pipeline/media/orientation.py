"""Which way up a frame is: what its display matrix says."""

from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import Type
from jaxtyping import UInt8

from data_pipeline.errors import NotWanted

Picture = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Orientation:
    """How stored rows and columns become shown ones: swapped or not, then turned about."""

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    def turn(self, stored: Picture) -> Picture:
        """A picture upright."""
        shown = stored.swapaxes(0, 1) if self.is_transposed else stored
        return shown[:: -1 if self.flips_rows else 1, :: -1 if self.flips_columns else 1]

    def turn_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a stored picture as shown, or of a shown one as stored."""
        return size[::-1] if self.is_transposed else size


def orientation(frame: av.VideoFrame) -> Orientation | None:
    """What the display matrix of a frame says; None: it has none. NotWanted if it is askew.

    With rows (a, b, u), (c, d, v), (x, y, w), column' = a column + c row, row' = b column + d row.
    """
    if Type.DISPLAYMATRIX not in frame.side_data:
        return None
    a, b, _, c, d = np.frombuffer(frame.side_data[Type.DISPLAYMATRIX], np.int32)[:5].tolist()
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= 0.01 * straight:
        return Orientation(False, flips_rows=d < 0, flips_columns=a < 0)
    if max(abs(a), abs(d)) <= 0.01 * crossed:
        return Orientation(True, flips_rows=b < 0, flips_columns=c < 0)
    raise NotWanted("is turned by no quarter turn: its display matrix is askew")


def orientation_of(*frames: av.VideoFrame) -> Orientation:
    """What the first of some frames that has a display matrix says; without any, as stored."""
    return next(filter(None, map(orientation, frames)), Orientation())
