"""Tiles of a level: where they lie, and how overlapping ones are averaged (MultiDiffusion)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Size3 = tuple[int, int, int]
Tiles = Float[Tensor, "tiles channels tile_frames tile_height tile_width"]


def axis_offsets(size: int, patch: int, overlap: bool) -> list[int]:
    """Low corners along one axis: `size / patch` tiles side by side, or `2 size / patch - 1` that
    overlap by half."""
    step = patch // 2 if overlap and size > patch else patch
    return list(range(0, size - patch + 1, step))


def tile_offsets(size: Size3, patch: Size3, overlap: str) -> Int[Tensor, "tiles 3"]:
    """Low corners of all tiles; `overlap` names the axes that overlap: f, h, w."""
    axes = [
        torch.tensor(axis_offsets(size[axis], patch[axis], letter in overlap))
        for axis, letter in enumerate("fhw")
    ]
    return torch.cartesian_prod(*axes)


def blending_weights(
    offsets: Int[Tensor, "tiles 3"], patch: Size3, size: Size3
) -> Float[Tensor, "frames height width"]:
    """One over the number of tiles that cover each place."""
    count = torch.zeros(size)
    for offset in offsets.tolist():
        count[_box(offset, patch)] += 1
    return 1 / count


def add_tiles(
    canvas: Float[Tensor, "channels frames height width"],
    tiles: Tiles,
    offsets: Int[Tensor, "tiles 3"],
) -> None:
    """Add tiles to a canvas in place; times `blending_weights`, that is their average."""
    frames, height, width = tiles.shape[2:]
    patch = (frames, height, width)
    for tile, offset in zip(tiles, offsets.tolist(), strict=True):
        canvas[(slice(None), *_box(offset, patch))] += tile


def cut_tiles(
    canvas: Float[Tensor, "channels frames height width"],
    offsets: Int[Tensor, "tiles 3"],
    patch: Size3,
) -> Tiles:
    """The windows of a canvas at the tiles' offsets."""
    return torch.stack([canvas[(slice(None), *_box(o, patch))] for o in offsets.tolist()])


def _box(offset: list[int], patch: Size3) -> tuple[slice, slice, slice]:
    pairs = zip(offset, patch, strict=True)
    frames, height, width = (slice(low, low + side) for low, side in pairs)
    return frames, height, width
