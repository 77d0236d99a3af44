"""Geometry of the patch hierarchy: level sizes, nested windows, and cutting patches from clips.

Levels are numbered 0 = coarsest (the whole clip at patch resolution); the paper counts from 1.
A window at a level is given by its integer `offset` (frames, height, width), counted in that
level's own pixels; its side is always `patch_size`.
"""

import numpy as np
from einops import rearrange
from jaxtyping import Int64, UInt8
from pydantic import Field, model_validator

from data_pipeline.strict import Size, Strict

AXES = ("frames", "height", "width")

Clip = UInt8[np.ndarray, "frames height width 3"]
Patches = UInt8[np.ndarray, "levels patch_frames patch_height patch_width 3"]
LevelClip = UInt8[np.ndarray, "level_frames level_height level_width 3"]
Offsets = Int64[np.ndarray, "levels 3"]


class Pyramid(Strict):
    """The hierarchy: `levels` patches of `patch_size` pixels, nested inside a clip of `clip_size`.

    Each axis grows by one integer factor per level (`growth`): 2 where the pyramid refines it, 1
    where it does not (time, in the 16x576x1024 variant).
    """

    levels: int = Field(ge=1, le=8, description="number of levels, coarsest included")
    patch_size: Size = Field(description="pixels of every patch: (frames, height, width)")
    clip_size: Size = Field(description="pixels of the clip at the finest level")

    @model_validator(mode="after")
    def _refuse_impossible_geometry(self) -> "Pyramid":
        for axis, patch, clip in zip(AXES, self.patch_size, self.clip_size, strict=True):
            if patch * _growth(patch, clip, self.levels) ** (self.levels - 1) != clip:
                sizes = {patch * g ** (self.levels - 1): None for g in (1, 2)}
                fits = " or ".join(map(str, sizes))
                raise ValueError(
                    f"clip_size: {clip} ({axis}) is wrong because it does not come from patch_size "
                    f"{patch} by the same whole factor at each of {self.levels} levels; use {fits}"
                )
        return self

    @property
    def growth(self) -> tuple[int, int, int]:
        """Factor by which each axis grows from one level to the next."""
        (t, h, w), (frames, height, width) = self.patch_size, self.clip_size
        levels = self.levels
        return _growth(t, frames, levels), _growth(h, height, levels), _growth(w, width, levels)

    def size(self, level: int) -> tuple[int, int, int]:
        """(frames, height, width) of the whole clip at a level."""
        (t, h, w), (by_t, by_h, by_w) = self.patch_size, self.growth
        return t * by_t**level, h * by_h**level, w * by_w**level

    def stride(self, level: int) -> tuple[int, int, int]:
        """Finest-level pixels per pixel of a level, on each axis."""
        finer, (by_t, by_h, by_w) = self.levels - 1 - level, self.growth
        return by_t**finer, by_h**finer, by_w**finer


def draw_offsets(pyramid: Pyramid, rng: np.random.Generator) -> Offsets:
    """Random nested windows, finest first (section 7 of the specification).

    The finest offset is uniform over the clip; each coarser one is uniform among those whose
    window contains the finer one. Drawing coarsest first would starve the clip's borders.
    """
    offsets = np.zeros((pyramid.levels, 3), dtype=np.int64)
    finest = np.subtract(pyramid.clip_size, pyramid.patch_size)
    offsets[-1] = rng.integers(0, finest, endpoint=True)
    for level in range(pyramid.levels - 2, -1, -1):
        low, high = parent_offset_range(pyramid, level, offsets[level + 1])
        offsets[level] = rng.integers(low, high, endpoint=True)
    return offsets


def parent_offset_range(
    pyramid: Pyramid, level: int, child: Int64[np.ndarray, "3"]
) -> tuple[Int64[np.ndarray, "3"], Int64[np.ndarray, "3"]]:
    """Lowest and highest offset at `level` whose window contains `child`, one level finer."""
    patch, growth = np.array(pyramid.patch_size), np.array(pyramid.growth)
    last = np.array(pyramid.size(level)) - patch
    low = np.maximum(-(-(child + patch) // growth) - patch, 0)
    high = np.minimum(child // growth, last)
    return low, high


def cut_patches(clip: Clip, pyramid: Pyramid, offsets: Offsets) -> Patches:
    """The patches of all levels at their windows: frames by stride, pixels by area average.

    This is the definition; the loader's decoder computes the same bytes from fewer pixels.
    """
    patches = []
    for level, offset in enumerate(offsets):
        stride, patch = np.array(pyramid.stride(level)), np.array(pyramid.patch_size)
        low, high = offset * stride, (offset + patch) * stride
        region = clip[low[0] : high[0] : stride[0], low[1] : high[1], low[2] : high[2]]
        patches.append(area_average(region, *pyramid.stride(level)[1:]))
    return np.stack(patches)


def level_clip(clip: Clip, pyramid: Pyramid, level: int) -> LevelClip:
    """The whole clip as a level sees it: frames by stride, pixels by area average."""
    frame_stride, height_stride, width_stride = pyramid.stride(level)
    return area_average(clip[::frame_stride], height_stride, width_stride)


def area_average(
    frames: Clip, height_stride: int, width_stride: int
) -> UInt8[np.ndarray, "frames level_height level_width 3"]:
    """Mean over blocks of pixels, rounded half up."""
    if height_stride == width_stride == 1:
        return frames
    # Added slice by slice: ten times as fast as a sum over the axes of blocks.
    rows = _sum_slices([frames[:, y::height_stride] for y in range(height_stride)])
    total = _sum_slices([rows[:, :, x::width_stride] for x in range(width_stride)])
    area = height_stride * width_stride
    return ((total + area // 2) // area).astype(np.uint8)


def repeat_still(image: UInt8[np.ndarray, "height width 3"], frames: int) -> Clip:
    """An image as a still clip."""
    return np.repeat(rearrange(image, "h w c -> 1 h w c"), frames, axis=0)


def _growth(patch: int, clip: int, levels: int) -> int:
    """The whole factor per level that comes nearest to leading from patch to clip."""
    return max(round((clip / patch) ** (1 / (levels - 1))), 1) if levels > 1 else 1


def _sum_slices(slices: list[np.ndarray]) -> np.ndarray:
    """Sum of equal slices, in the narrowest type that holds it."""
    highest = len(slices) * int(np.iinfo(slices[0].dtype).max)
    total = slices[0].astype(np.uint16 if highest < 2**16 else np.uint32)
    for other in slices[1:]:
        total += other
    return total
