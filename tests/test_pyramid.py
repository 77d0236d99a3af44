"""The geometry of the hierarchy: sizes, nested windows and their distribution, patches."""

from itertools import pairwise, product

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from pydantic import ValidationError

from data_pipeline.pyramid import (
    Pyramid,
    cut_patches,
    draw_offsets,
    level_clip,
    parent_offset_range,
    repeat_still,
)

UCF = Pyramid(levels=3, patch_size=(16, 64, 64), clip_size=(64, 256, 256))
T2V = Pyramid(levels=4, patch_size=(8, 36, 64), clip_size=(64, 288, 512))
T2V_1K = Pyramid(levels=4, patch_size=(16, 72, 128), clip_size=(16, 576, 1024))
THIRDS = Pyramid(levels=3, patch_size=(2, 3, 4), clip_size=(2, 27, 16))
FLAT = Pyramid(levels=1, patch_size=(2, 3, 4), clip_size=(2, 3, 4))
SMALL = Pyramid(levels=3, patch_size=(2, 3, 4), clip_size=(8, 12, 16))
PYRAMIDS = [UCF, T2V, T2V_1K, THIRDS, FLAT, SMALL]


@pytest.mark.parametrize(
    ("pyramid", "sizes"),
    [
        (UCF, [(16, 64, 64), (32, 128, 128), (64, 256, 256)]),
        (T2V, [(8, 36, 64), (16, 72, 128), (32, 144, 256), (64, 288, 512)]),
        (T2V_1K, [(16, 72, 128), (16, 144, 256), (16, 288, 512), (16, 576, 1024)]),
        (FLAT, [(2, 3, 4)]),
    ],
)
def test_level_sizes_are_the_published_ones(pyramid, sizes):
    assert [pyramid.size(level) for level in range(pyramid.levels)] == sizes


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_a_pixel_of_a_level_is_stride_pixels_of_the_clip(pyramid):
    for level in range(pyramid.levels):
        assert np.array_equal(
            np.multiply(pyramid.size(level), pyramid.stride(level)), pyramid.clip_size
        )


def test_geometry_that_no_whole_factor_makes_is_refused_with_a_way_out():
    with pytest.raises(ValidationError, match=r"500 \(width\) .* 64 .* 4 levels; use 64 or 512"):
        Pyramid(levels=4, patch_size=(8, 36, 64), clip_size=(64, 288, 500))
    with pytest.raises(ValidationError, match=r"at each of 1 levels; use 8 "):
        Pyramid(levels=1, patch_size=(8, 36, 64), clip_size=(16, 36, 64))


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_finer_window_lies_inside_coarser(pyramid):
    rng = np.random.default_rng(0)
    patch, growth = np.array(pyramid.patch_size), np.array(pyramid.growth)
    for _ in range(200):
        offsets = draw_offsets(pyramid, rng)
        assert offsets.dtype == np.int64
        assert (offsets[0] == 0).all()
        for level, offset in enumerate(offsets):
            assert (offset >= 0).all()
            assert (offset + patch <= pyramid.size(level)).all()
        for parent, child in pairwise(offsets):
            assert (growth * parent <= child).all()
            assert (child + patch <= growth * (parent + patch)).all()


@pytest.mark.parametrize("pyramid", [SMALL, THIRDS])
def test_parent_offsets_are_exactly_those_whose_window_contains_the_child(pyramid):
    patch, growth = pyramid.patch_size, pyramid.growth
    for level in range(pyramid.levels - 1):
        sizes, child_sizes = pyramid.size(level), pyramid.size(level + 1)
        for axis in range(3):
            for child in range(child_sizes[axis] - patch[axis] + 1):
                low, high = parent_offset_range(pyramid, level, np.full(3, child, dtype=np.int64))
                containing = [
                    parent
                    for parent in range(sizes[axis] - patch[axis] + 1)
                    if growth[axis] * parent <= child
                    and child + patch[axis] <= growth[axis] * (parent + patch[axis])
                ]
                assert list(range(low[axis], high[axis] + 1)) == containing


def designed_distributions(pyramid: Pyramid, axis: int) -> list[np.ndarray]:
    """Probability of each offset at each level: finest uniform, each parent uniform given it."""
    sides = [pyramid.size(level)[axis] for level in range(pyramid.levels)]
    patch, growth = pyramid.patch_size[axis], pyramid.growth[axis]
    chances = [np.full(sides[-1] - patch + 1, 1 / (sides[-1] - patch + 1))]
    for level in range(pyramid.levels - 2, -1, -1):
        coarser = np.zeros(sides[level] - patch + 1)
        for child, chance in enumerate(chances[0]):
            parents = [
                parent
                for parent in range(len(coarser))
                if 0 <= child - growth * parent <= (growth - 1) * patch
            ]
            coarser[parents] += chance / len(parents)
        chances.insert(0, coarser)
    return chances


@pytest.mark.parametrize(("pyramid", "draws"), [(SMALL, 4_000), (THIRDS, 4_000)])
def test_drawn_windows_follow_the_designed_distribution(pyramid, draws):
    rng = np.random.default_rng(1)
    offsets = np.stack([draw_offsets(pyramid, rng) for _ in range(draws)])
    for axis in range(3):
        for level, chances in enumerate(designed_distributions(pyramid, axis)):
            seen = np.bincount(offsets[:, level, axis], minlength=len(chances))
            assert len(seen) == len(chances)
            # Five standard deviations of a count.
            allowed = 5 * np.sqrt(draws * chances * (1 - chances)) + 1e-9 * draws
            assert (abs(seen - draws * chances) <= allowed).all()


@pytest.mark.parametrize(("levels", "outermost"), [(3, 0.167), (4, 0.286)])
def test_coverage_of_the_outermost_strip_is_the_designed_one(levels, outermost):
    # Drawn coarsest first it would be 0.021 and 0.005.
    patch, draws = 64, 3_000
    side = patch * 2 ** (levels - 1)
    pyramid = Pyramid(
        levels=levels, patch_size=(1, 4, patch), clip_size=(1, 4 * 2 ** (levels - 1), side)
    )
    rng = np.random.default_rng(2)
    lows = np.array([draw_offsets(pyramid, rng)[-1, 2] for _ in range(draws)])
    pixels = np.arange(side)[:, None]
    coverage = ((lows <= pixels) & (pixels < lows + patch)).mean(axis=1)
    strips = coverage.reshape(16, -1).mean(axis=1) / coverage.mean()
    # Sampling error of a strip is below 0.02.
    assert strips[0] == pytest.approx(outermost, abs=0.08)
    assert strips[-1] == pytest.approx(outermost, abs=0.08)
    exact = np.array(
        [min(p + 1, patch, side - p, side - patch + 1) for p in range(side)], dtype=float
    )
    exact = exact.reshape(16, -1).mean(axis=1) / exact.mean()
    assert strips == pytest.approx(exact, abs=0.15)
    assert exact[0] == pytest.approx(outermost, abs=0.01)


def test_windows_are_a_function_of_the_generator():
    first, second = (draw_offsets(T2V, np.random.default_rng(5)) for _ in range(2))
    assert (first == second).all()


def random_clip(pyramid: Pyramid, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*pyramid.clip_size, 3), dtype=np.uint8)


@pytest.mark.parametrize("pyramid", [SMALL, THIRDS])
def test_patches_equal_a_pixel_by_pixel_oracle(pyramid):
    clip = random_clip(pyramid)
    rng = np.random.default_rng(3)
    for _ in range(3):
        offsets = draw_offsets(pyramid, rng)
        patches = cut_patches(clip, pyramid, offsets)
        for level, offset in enumerate(offsets):
            frame_stride, height_stride, width_stride = pyramid.stride(level)
            area = height_stride * width_stride
            for place in product(*map(range, pyramid.patch_size)):
                t, h, w = offset + place
                block = clip[
                    t * frame_stride,
                    h * height_stride : (h + 1) * height_stride,
                    w * width_stride : (w + 1) * width_stride,
                ]
                for channel in range(3):
                    total = sum(int(value) for value in block[..., channel].flat)
                    half_up = (2 * total + area) // (2 * area)
                    assert patches[level, *place, channel] == half_up


@pytest.mark.parametrize("pyramid", [SMALL, THIRDS, FLAT])
def test_patches_are_windows_of_the_whole_level(pyramid):
    clip, rng = random_clip(pyramid), np.random.default_rng(4)
    offsets = draw_offsets(pyramid, rng)
    for level, patch in enumerate(cut_patches(clip, pyramid, offsets)):
        (t, h, w), (frames, height, width) = offsets[level], pyramid.patch_size
        whole = level_clip(clip, pyramid, level)
        assert whole.shape[:3] == pyramid.size(level)
        assert (patch == whole[t : t + frames, h : h + height, w : w + width]).all()


def test_the_finest_level_is_the_clip_itself():
    clip = random_clip(SMALL)
    assert (level_clip(clip, SMALL, SMALL.levels - 1) == clip).all()


def test_patches_of_a_still_do_not_move():
    image = random_clip(SMALL)[0]
    still = repeat_still(image, SMALL.clip_size[0])
    assert (still == image).all()
    patches = cut_patches(still, SMALL, draw_offsets(SMALL, np.random.default_rng(6)))
    assert (patches == patches[:, :1]).all()


def test_shapes_are_checked_while_testing():
    with pytest.raises(TypeCheckError):
        repeat_still(np.zeros((2, 3, 4), dtype=np.uint8), 2)
