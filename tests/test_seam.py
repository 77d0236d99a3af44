"""Seams: what the score says of fields without any, of planted ones, and where it looks."""

import numpy as np
import pytest
from scipy import ndimage

from t2v.evaluation.seam import seam_energies, seam_scores
from t2v.methods.hpdm.tiling import tile_borders, tile_level

SIZE, PATCH = (8, 48, 64), (4, 12, 16)


def fields(count: int, planted: float = 0.0, overlap: str = "") -> np.ndarray:
    """Energies of smooth random fields, of the same law everywhere; `planted` is the deviation
    of the brightness that each tile has of its own."""
    rng = np.random.default_rng(0)
    borders = tile_borders([tile_level(SIZE, PATCH, overlap)])
    found = []
    for _ in range(count):
        noise = rng.normal(size=(*SIZE, 3))
        field = ndimage.gaussian_filter(noise, (1, 2, 2, 0), mode="wrap")
        field *= 40 / field.std()
        tiles = rng.normal(size=(2, 4, 4, 1)).repeat(4, 0).repeat(12, 1).repeat(16, 2)
        clip = (128 + field + planted * tiles).round().clip(0, 255).astype(np.uint8)
        found.append(seam_energies(clip, borders))
    return np.stack(found)


def test_borders_are_where_tiles_begin_and_end():
    assert tile_borders([tile_level(SIZE, PATCH, "")]) == ((4,), (12, 24, 36), (16, 32, 48))
    t, h, w = tile_borders([tile_level(SIZE, PATCH, "hw")])
    assert (t, h, w) == ((4,), (6, 12, 18, 24, 30, 36, 42), (8, 16, 24, 32, 40, 48, 56))
    assert tile_borders([tile_level(PATCH, PATCH, "fhw")]) == ((), (), ())
    both = [tile_level(SIZE, PATCH, "", shifted=shifted) for shifted in ("", "w")]
    assert tile_borders(both)[2] == (8, 16, 24, 32, 40, 48, 56)


@pytest.mark.parametrize("overlap", ["", "hw"])
def test_a_field_without_seams_scores_one(overlap):
    scores = seam_scores(fields(40, overlap=overlap))
    # 40 fields: the mean energy at borders is known to about 2 %.
    assert all(score == pytest.approx(1, abs=0.08) for score in scores.values())
    assert set(scores) == {"frames", "height", "width", "seam"}


def test_the_score_rises_with_planted_seams():
    scores = [seam_scores(fields(8, planted=by))["seam"] for by in (0, 2, 5, 12, 30)]
    assert scores == sorted(scores)
    assert scores[-1] > 3


def test_one_colour_has_no_seam_and_a_colour_per_tile_has_the_worst():
    borders = tile_borders([tile_level(SIZE, PATCH, "")])
    grey = np.full((*SIZE, 3), 128, np.uint8)
    assert set(seam_scores(seam_energies(grey, borders)[None]).values()) == {1.0}
    grey[:, :, 16:32] = 228
    scores = seam_scores(seam_energies(grey, borders)[None])
    assert scores["frames"] == scores["height"] == 1
    assert scores["width"] > 10_000
    assert seam_scores(seam_energies(grey, ((), (), ()))[None]) == {"seam": 1.0}
