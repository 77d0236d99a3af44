"""Tiles cover a level as published, and their average is an average."""

from math import prod
from pathlib import Path

import pytest
import torch

from t2v.config import load_config
from t2v.tiling import add_tiles, blending_weights, cut_tiles, tile_offsets

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAPS = ["", "h", "w", "hw", "f", "fh", "fw", "fhw"]


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
    pyramid = load_config(CONFIGS / f"{name}.yaml").pyramid
    for level, count in enumerate(counts):
        assert len(tile_offsets(pyramid.size(level), pyramid.patch_size, overlap)) == count


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_tiles_cover_every_place_and_stay_inside(overlap):
    size, patch = (4, 12, 8), (2, 6, 4)
    offsets = tile_offsets(size, patch, overlap)
    assert len({tuple(offset) for offset in offsets.tolist()}) == len(offsets)
    assert (offsets >= 0).all()
    assert (offsets + torch.tensor(patch) <= torch.tensor(size)).all()
    weights = blending_weights(offsets, patch, size)
    assert weights.isfinite().all()
    assert float(weights.max()) == 1
    # An axis that overlaps covers its inner places twice, its outermost half patches once.
    assert float(weights.min()) == 1 / 2 ** len(overlap)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_blending_weights_sum_to_one(overlap):
    size, patch = (4, 12, 8), (2, 6, 4)
    offsets = tile_offsets(size, patch, overlap)
    weights = blending_weights(offsets, patch, size)
    total = torch.zeros(1, *size)
    add_tiles(total, cut_tiles(weights[None], offsets, patch), offsets)
    torch.testing.assert_close(total, torch.ones(1, *size))


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_the_average_of_a_canvas_s_own_tiles_is_the_canvas(overlap):
    size, patch = (4, 12, 8), (2, 6, 4)
    canvas = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    offsets = tile_offsets(size, patch, overlap)
    tiles = cut_tiles(canvas, offsets, patch)
    assert tiles.shape == (len(offsets), 3, *patch)
    average = torch.zeros_like(canvas)
    add_tiles(average, tiles, offsets)
    torch.testing.assert_close(average * blending_weights(offsets, patch, size), canvas)


def test_a_level_of_one_tile_is_one_tile_whatever_overlaps():
    assert tile_offsets((1, 6, 4), (1, 6, 4), "fhw").tolist() == [[0, 0, 0]]


def test_without_overlap_tiles_are_a_partition():
    size, patch = (4, 12, 8), (2, 6, 4)
    offsets = tile_offsets(size, patch, "")
    assert len(offsets) * prod(patch) == prod(size)
    assert (blending_weights(offsets, patch, size) == 1).all()
