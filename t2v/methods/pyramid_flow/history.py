"""The temporal pyramid: a clip is made unit by unit, and the older a unit the coarser it is seen.

A unit is a stretch of frames that are denoised together: the first is one frame, each later one
`unit_frames`. One layout serves training and sampling.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.pyramid_flow.flow import PerSample, down_by

Piece = Float[Tensor, "batch channels frames height width"]


@dataclass(frozen=True)
class Stretch:
    """Successive units that are seen at one level."""

    first: int
    end: int  # one past the last
    level: int


@dataclass(frozen=True)
class Units:
    """The units of a clip: where each one ends, counted in frames."""

    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def start(self, unit: int) -> int:
        """The first frame of a unit."""
        return self.ends[unit - 1] if unit else 0

    def frames(self, stretch: Stretch) -> slice:
        """The frames of a stretch."""
        return slice(self.start(stretch.first), self.ends[stretch.end - 1])


def units_of(frames: int, unit_frames: int | None) -> Units:
    """One frame and then units of `unit_frames`; all frames at once where that is None."""
    ends = [frames] if unit_frames is None else range(1, frames + 1, unit_frames)
    return Units(tuple(ends))


def lay_out(unit: int, stage: int) -> list[Stretch]:
    """What the network sees while it denoises a unit at a stage, oldest first: the history, the
    unit before at the stage's level, each older one a level coarser; and last the unit itself."""
    levels = [max(stage - (unit - 1 - older), 0) for older in range(unit)]
    history, first = [], 0
    for level, alike in groupby(levels):
        end = first + len(list(alike))
        history.append(Stretch(first, end, level))
        first = end
    return [*history, Stretch(unit, unit + 1, stage)]


def history_pieces(
    clean: Piece, units: Units, *, unit: int, stage: int, stages: int
) -> list[Piece]:
    """The history of a unit, oldest first, out of clean frames of full resolution."""
    return [
        down_by(clean[:, :, units.frames(stretch)], stages - 1 - stretch.level)
        for stretch in lay_out(unit, stage)[:-1]
    ]


def corrupt(pieces: list[Piece], noise: list[Piece], share: PerSample) -> list[Piece]:
    """History with a share of noise, one share for all of a sample: what the network has made
    itself is never as clean as data."""
    share = share[:, None, None, None, None]
    return [torch.lerp(piece, z, share) for piece, z in zip(pieces, noise, strict=True)]
