"""Tiles cover a level as published, and their average is an average."""

from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import ConfigError
from t2v.methods.hpdm.tiling import OVERLAPS, Tiling, cut_tile, tile_level
from t2v.recipe.recipe import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE, PATCH = (4, 12, 8), (2, 6, 4)
# Counts of one axis by level; a level's tiles are the product over its axes.
ALONG_AXIS = {False: [1, 2, 4, 8], True: [1, 3, 7, 15]}
VARIANTS = [
    {"overlap": overlap, "shifted": shifted, "blending": blending}
    for overlap in OVERLAPS
    for shifted in OVERLAPS
    for blending in ("uniform", "tapered")
    if not set(overlap) & set(shifted)
]


@pytest.mark.parametrize(
    ("name", "overlap", "counts"),
    [
        ("t2v_64x288x512", "", [1, 8, 64, 512]),
        ("t2v_64x288x512", "hw", [1, 18, 196, 1800]),
        ("t2v_64x288x512", "fh", [1, 18, 196, 1800]),
        ("t2v_64x288x512", "fhw", [1, 27, 343, 3375]),
        ("ucf101_s", "", [1, 8, 64]),
        ("ucf101_s", "hw", [1, 18, 196]),
        ("ucf101_s", "fhw", [1, 27, 343]),
        ("t2v_16x576x1024", "", [1, 4, 16, 64]),
        ("t2v_16x576x1024", "hw", [1, 9, 49, 225]),
    ],
)
def test_tile_counts_are_the_published_ones(name, overlap, counts):
    pyramid = load_config(CONFIGS / f"{name}.yaml").method.pyramid
    for level, count in enumerate(counts):
        assert len(tile_level(pyramid.size(level), pyramid.patch_size, overlap)) == count


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("name", ["t2v_64x288x512", "ucf101_s", "t2v_16x576x1024"])
def test_every_overlap_has_the_product_of_its_axes_counts(name, overlap):
    pyramid = load_config(CONFIGS / f"{name}.yaml").method.pyramid
    for level in range(pyramid.levels):
        wanted = prod(
            ALONG_AXIS[letter in overlap][level] if pyramid.growth[axis] == 2 else 1
            for axis, letter in enumerate("fhw")
        )
        assert len(tile_level(pyramid.size(level), pyramid.patch_size, overlap)) == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_stay_inside_and_their_shares_sum_to_one(variant):
    tiling = tile_level(SIZE, PATCH, **variant)
    assert len({tuple(offset) for offset in tiling.offsets.tolist()}) == len(tiling)
    total = torch.zeros(SIZE)
    for tile, offset in enumerate(tiling.offsets.tolist()):
        share = tiling.share(tile)
        assert share.shape == PATCH
        assert float(share.min()) > 0
        cut_tile(total, offset, PATCH).add_(share)
    torch.testing.assert_close(total, torch.ones(SIZE))


@pytest.mark.parametrize("variant", VARIANTS[::3])
def test_the_average_of_a_canvas_s_own_tiles_is_the_canvas(variant):
    tiling = tile_level(SIZE, PATCH, **variant)
    canvas = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0))
    average = torch.zeros_like(canvas)
    for tile, offset in enumerate(tiling.offsets.tolist()):
        content = cut_tile(canvas, offset, PATCH)
        cut_tile(average, offset, PATCH).addcmul_(content, tiling.share(tile))
    torch.testing.assert_close(average, canvas)


def test_tapered_shares_fall_from_the_middle_of_a_tile_to_its_ends():
    tiling = tile_level((16, 8, 8), (8, 8, 8), "f", blending="tapered")
    middle = tiling.share(1)[:, 0, 0]
    torch.testing.assert_close(middle, torch.tensor([1, 3, 5, 7, 7, 5, 3, 1]) / 8)
    # Where only one tile is, it counts whole.
    assert (tiling.share(0)[:4] == 1).all()


def test_token_shares_are_those_of_pixels_where_weights_are_uniform():
    size, patch, token = (8, 24, 32), (4, 12, 16), (1, 3, 4)
    for overlap in ("", "w", "fhw"):
        tiling = tile_level(size, patch, overlap)
        for tile in range(len(tiling)):
            assert torch.equal(tiling.share(tile, token), tiling.share(tile)[:, ::3, ::4])


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("most", [1, 4, 10, 1000])
def test_slabs_share_no_tile_and_make_up_the_level(overlap, most):
    tiling = tile_level((8, 24, 16), PATCH, overlap)
    slabs = tiling.slabs(most)
    inside = [tiling.inside(slab) for slab in slabs]
    assert sorted(tile for tiles in inside for tile in tiles) == list(range(len(tiling)))
    assert len({slab.axis for slab in slabs}) == 1
    assert [a.high for a in slabs][:-1] == [b.low for b in slabs][1:]
    for slab, tiles in zip(slabs, inside, strict=True):
        low = tiling.offsets[tiles][:, slab.axis]
        assert int(low.min()) == slab.low
        assert int(low.max()) + PATCH[slab.axis] == slab.high
    if overlap != "fhw" and most >= max(map(len, map(tiling.inside, tiling.slabs(1)))):
        assert max(map(len, inside)) <= most


def test_shifted_tiles_put_their_middles_where_others_meet():
    plain, moved = (tile_level((16, 4, 4), (4, 4, 4), "", shifted=s) for s in ("", "f"))
    assert plain.places[0] == (0, 4, 8, 12)
    assert moved.places[0] == (0, 2, 6, 10, 12)
    assert all(b - a <= 4 for a, b in pairwise(moved.places[0]))


def test_a_level_of_one_tile_is_one_tile_whatever_overlaps():
    assert tile_level((1, 6, 4), (1, 6, 4), "fhw").offsets.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("size", "patch", "overlap", "words"),
    [
        ((4, 10, 8), (2, 4, 4), "", "10 (height) is wrong because tiles of 4 cannot cover it"),
        ((4, 12, 9), (2, 6, 3), "w", "9 (width) is wrong because tiles of 3 cannot cover it"),
        ((2, 12, 8), (4, 6, 4), "", "2 (frames) is wrong"),
    ],
)
def test_a_geometry_that_tiles_cannot_cover_is_refused(size, patch, overlap, words):
    with pytest.raises(ConfigError) as refused:
        tile_level(size, patch, overlap)
    assert words in str(refused.value)


def test_tiles_are_numbered_with_the_last_axis_fastest():
    tiling = Tiling(((0, 1), (0, 2, 4), (0, 3)), (1, 2, 3), (2, 6, 6))
    assert tiling.offsets[3].tolist() == [0, 2, 3]
