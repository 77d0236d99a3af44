"""Tiles of a level: where they lie, and how overlapping ones are averaged (MultiDiffusion)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import prod
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.pyramid import AXES

Size3 = tuple[int, int, int]
Blending = Literal["uniform", "tapered"]
OVERLAPS = ("", "f", "h", "w", "fh", "fw", "hw", "fhw")


@dataclass(frozen=True)
class Slab:
    """A range of a level's canvas along one axis, in pixels."""

    axis: int
    low: int
    high: int

    def of(self, canvas: Float[Tensor, "clips channels frames height width"]) -> Tensor:
        """The canvas inside the slab; memory is shared."""
        return canvas.narrow(self.axis + 2, self.low, self.high - self.low)

    def shrunk(self, growth: Size3) -> "Slab":
        """The same part of the level before."""
        return Slab(self.axis, self.low // growth[self.axis], self.high // growth[self.axis])


@dataclass(frozen=True)
class Tiling:
    """Tiles of one size whose low corners are all combinations of a few places on each axis.

    A tile's share of a pixel is its blending weight there over the sum of all tiles' weights.
    """

    places: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    patch: Size3
    size: Size3
    blending: Blending = "uniform"

    def __len__(self) -> int:
        return prod(len(places) for places in self.places)

    @cached_property
    def offsets(self) -> Int[Tensor, "tiles 3"]:
        """Low corners of all tiles, (frames, height, width)."""
        return torch.cartesian_prod(*(torch.tensor(places) for places in self.places))

    def share(
        self, tile: int, token_size: Size3 = (1, 1, 1)
    ) -> Float[Tensor, "tile_frames tile_height tile_width"]:
        """What a tile adds to the average at each of its pixels, or tokens of `token_size`."""
        numbers = np.unravel_index(tile, [len(places) for places in self.places])
        axes = zip(self.places, self.patch, self.size, token_size, strict=True)
        t, h, w = (
            axis_shares(places, side, whole, token, self.blending)[number]
            for number, (places, side, whole, token) in zip(numbers, axes, strict=True)
        )
        return t[:, None, None] * h[:, None] * w

    def slabs(self, most_tiles: int) -> list[Slab]:
        """The canvas cut where no tile crosses, into the fewest slabs of at most `most_tiles`
        tiles each, or into the smallest there are; tiles of two slabs never meet."""
        free = [
            axis
            for axis, places in enumerate(self.places)
            if len(places) > 1 and all(b - a >= self.patch[axis] for a, b in pairwise(places))
        ]
        if not free or len(self) <= most_tiles:
            return [Slab(0, 0, self.size[0])]
        axis = max(free, key=lambda axis: len(self.places[axis]))
        places = self.places[axis]
        each = max(1, most_tiles // (len(self) // len(places)))
        starts = [*places[::each], self.size[axis]]
        return [Slab(axis, low, high) for low, high in pairwise(starts)]

    def inside(self, slab: Slab) -> list[int]:
        """Numbers of the tiles that lie in a slab."""
        low = self.offsets[:, slab.axis]
        return ((low >= slab.low) & (low < slab.high)).nonzero()[:, 0].tolist()

    def corner(self, tile: int, slab: Slab) -> list[int]:
        """A tile's low corner in its slab."""
        corner = self.offsets[tile].tolist()
        corner[slab.axis] -= slab.low
        return corner


def axis_offsets(size: int, patch: int, overlap: bool) -> list[int]:
    """Low corners along one axis: `size / patch` tiles side by side, or `2 size / patch - 1` that
    overlap by half."""
    step = patch // 2 if overlap and size > patch else patch
    return list(range(0, size - patch + 1, step))


def shifted_offsets(size: int, patch: int) -> list[int]:
    """Tiles side by side, moved by half a tile; one more closes each end."""
    if size <= patch:
        return [0]
    return [0, *range(patch // 2, size - patch + 1, patch), size - patch]


@cache
def axis_shares(
    places: tuple[int, ...], patch: int, size: int, token: int, blending: Blending
) -> Float[Tensor, "places side"]:
    """Each tile's weight over the sum of all tiles' weights, along one axis, at each of its pixels
    or at tokens of several.

    `tapered` weights fall linearly from a tile's middle to its ends.
    """
    places, patch, size = tuple(place // token for place in places), patch // token, size // token
    weights = torch.ones(patch, dtype=torch.float64)
    if blending == "tapered":
        middles = (torch.arange(patch, dtype=torch.float64) + 0.5) / patch
        weights = 1 - (2 * middles - 1).abs()
    total = torch.zeros(size, dtype=torch.float64)
    for place in places:
        total[place : place + patch] += weights
    return torch.stack([weights / total[place : place + patch] for place in places]).float()


def tile_level(
    size: Size3, patch: Size3, overlap: str, *, shifted: str = "", blending: Blending = "uniform"
) -> Tiling:
    """The tiles of a level; `overlap` names the axes on which neighbours overlap by half (f, h, w),
    `shifted` those on which the tiles are moved by half of one."""
    places = []
    for axis, letter in enumerate("fhw"):
        whole, side = size[axis], patch[axis]
        needs_half = letter in overlap + shifted and whole > side
        if whole < side or whole % side or (needs_half and side % 2):
            remedy = "an even patch" if needs_half and side % 2 else f"a multiple of {side}"
            raise ConfigError(
                f"sampling: a level of {whole} ({AXES[axis]}) is wrong because tiles of {side} "
                f"cannot cover it; use {remedy}."
            )
        moved = shifted_offsets(whole, side) if letter in shifted else None
        places.append(tuple(moved or axis_offsets(whole, side, letter in overlap)))
    t, h, w = places
    return Tiling((t, h, w), patch, size, blending)


def tile_borders(tilings: list[Tiling]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Places along each axis where some tile begins or ends inside the clip."""
    found: list[tuple[int, ...]] = []
    for axis in range(3):
        ends = {
            end
            for tiling in tilings
            for place in tiling.places[axis]
            for end in (place, place + tiling.patch[axis])
        }
        found.append(tuple(sorted(ends - {0, tilings[0].size[axis]})))
    return found[0], found[1], found[2]


def cut_tile(
    canvas: Float[Tensor, "*any frames height width"], offset: Sequence[int], patch: Size3
) -> Float[Tensor, "*any tile_frames tile_height tile_width"]:
    """The window of a canvas at a tile's offset; memory is shared."""
    pairs = zip(offset, patch, strict=True)
    return canvas[(..., *(slice(low, low + side) for low, side in pairs))]
