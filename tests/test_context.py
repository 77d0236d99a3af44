"""Context sampling against a generic grid sample, a linear ramp, and itself on smaller boxes."""

from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from data_pipeline.pyramid import Pyramid, draw_offsets
from t2v.methods.hpdm.context import ContextFusion, TokenGrid, sample_volume

GRIDS = {
    "all axes": TokenGrid(
        Pyramid(levels=3, patch_size=(4, 6, 8), clip_size=(16, 24, 32)), (1, 3, 4)
    ),
    "long tokens": TokenGrid(
        Pyramid(levels=3, patch_size=(4, 6, 8), clip_size=(16, 24, 32)), (2, 2, 2)
    ),
    "space only": TokenGrid(
        Pyramid(levels=3, patch_size=(3, 4, 6), clip_size=(3, 16, 24)), (1, 1, 2)
    ),
    "by three": TokenGrid(Pyramid(levels=2, patch_size=(2, 3, 4), clip_size=(6, 9, 12)), (1, 1, 1)),
    "four levels": TokenGrid(
        Pyramid(levels=4, patch_size=(2, 3, 4), clip_size=(16, 24, 32)), (1, 3, 4)
    ),
}
ALL_GRIDS = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def windows(grid: TokenGrid, batch: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw_offsets(grid.pyramid, rng) for _ in range(batch)]))


def level_pairs(grid: TokenGrid) -> list[tuple[int, int]]:
    return [(child, parent) for child in range(grid.pyramid.levels) for parent in range(child)]


def token_places(
    grid: TokenGrid, level: int, offsets: torch.Tensor, count: tuple[int, int, int]
) -> list[torch.Tensor]:
    """Where tokens are along each axis, in finest pixels, from first principles: a pixel row of
    space lies at its centre; a frame, taken by stride, at the finest frame it is."""
    places = []
    for axis in range(3):
        token, stride = grid.token_size[axis], grid.pyramid.stride(level)[axis]
        members = torch.arange(count[axis] * token) + offsets[:, axis, None]
        centers = members * stride + (0.0 if axis == 0 else stride / 2)
        places.append(centers.unflatten(1, (count[axis], token)).double().mean(2))
    return places


def grid_samples(
    grid: TokenGrid,
    volume: torch.Tensor,
    child_places: list[torch.Tensor],
    parent_places: list[torch.Tensor],
) -> torch.Tensor:
    """The generic way: torch's 3-D grid sample at normalised coordinates, clamped at borders."""
    normalised = []
    for child, parent in zip(child_places, parent_places, strict=True):
        count = parent.shape[1]
        # Grid points of one token lie at its middle: `2 (i + 1/2) / count - 1`.
        pitch = parent[:, 1:2] - parent[:, :1] if count > 1 else torch.ones(1)
        index = (child - parent[:, :1]) / pitch
        normalised.append((2 * (index + 0.5) / count - 1).to(volume.dtype))
    t, h, w = normalised
    places = torch.stack(
        [
            w[:, None, None, :].expand(-1, t.shape[1], h.shape[1], -1),
            h[:, None, :, None].expand(-1, t.shape[1], -1, w.shape[1]),
            t[:, :, None, None].expand(-1, -1, h.shape[1], w.shape[1]),
        ],
        dim=4,
    )
    sampled = F.grid_sample(
        rearrange(volume, "b t h w d -> b d t h w"),
        places,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return rearrange(sampled, "b d t h w -> b (t h w) d")


@ALL_GRIDS
def test_separable_sampling_equals_generic_grid_sample(grid):
    batch = 16
    offsets = windows(grid, batch)
    generator = torch.Generator().manual_seed(0)
    for child, parent in level_pairs(grid):
        volume = torch.randn(batch, *grid.shape, 5, generator=generator, dtype=torch.float64)
        matrices = grid.matrices(child, offsets[:, child], parent, offsets[:, parent], grid.shape)
        expected = grid_samples(
            grid,
            volume,
            token_places(grid, child, offsets[:, child], grid.shape),
            token_places(grid, parent, offsets[:, parent], grid.shape),
        )
        # Places are computed in fp32.
        torch.testing.assert_close(sample_volume(volume, matrices), expected, rtol=0, atol=2e-5)


@ALL_GRIDS
def test_a_ramp_comes_back_exact_inside_and_clamped_at_the_edges(grid):
    offsets = windows(grid, 64, seed=1)
    for child, parent in level_pairs(grid):
        parents = token_places(grid, parent, offsets[:, parent], grid.shape)
        children = token_places(grid, child, offsets[:, child], grid.shape)
        ramp, expected = (
            torch.stack(
                [
                    t[:, :, None, None].expand(-1, -1, h.shape[1], w.shape[1]),
                    h[:, None, :, None].expand(-1, t.shape[1], -1, w.shape[1]),
                    w[:, None, None, :].expand(-1, t.shape[1], h.shape[1], -1),
                ],
                dim=4,
            )
            for t, h, w in (
                parents,
                [
                    torch.minimum(torch.maximum(place, near[:, :1]), near[:, -1:])
                    for place, near in zip(children, parents, strict=True)
                ],
            )
        )
        matrices = grid.matrices(child, offsets[:, child], parent, offsets[:, parent], grid.shape)
        context = sample_volume(ramp, matrices)
        # Places reach 32 pixels and are computed in fp32.
        torch.testing.assert_close(context, expected.flatten(1, 3), rtol=0, atol=1e-4)


def test_some_child_tokens_lie_past_the_outermost_parent_token():
    # Otherwise the law above would say nothing about edges.
    grid = GRIDS["all axes"]
    corner = torch.zeros(1, 3, dtype=torch.long)
    for axis in (1, 2):
        child = token_places(grid, 1, corner, grid.shape)[axis]
        parent = token_places(grid, 0, corner, grid.shape)[axis]
        assert float(child[0, 0]) < float(parent[0, 0])


def test_every_even_child_frame_coincides_with_a_parent_frame():
    grid = GRIDS["all axes"]
    offsets = windows(grid, 32, seed=2)
    for child in (1, 2):
        parent = child - 1
        frames = grid.matrices(child, offsets[:, child], parent, offsets[:, parent], grid.shape)[0]
        for row, (first, parent_first) in enumerate(
            zip(offsets[:, child, 0].tolist(), offsets[:, parent, 0].tolist(), strict=True)
        ):
            for frame in range(grid.shape[0]):
                if (first + frame) % 2 == 0:
                    same = torch.zeros(grid.shape[0])
                    same[(first + frame) // 2 - parent_first] = 1
                    assert (frames[row, frame] == same).all()


@ALL_GRIDS
def test_interpolation_weights_are_a_mean(grid):
    offsets = windows(grid, 16, seed=3)
    for child, parent in level_pairs(grid):
        for matrix in grid.matrices(
            child, offsets[:, child], parent, offsets[:, parent], grid.shape
        ):
            assert (matrix >= 0).all()
            torch.testing.assert_close(matrix.sum(2), torch.ones(matrix.shape[:2]))


@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(Pyramid(levels=3, patch_size=(2, 3, 4), clip_size=(8, 12, 16)), (1, 3, 4)),
        TokenGrid(Pyramid(levels=3, patch_size=(2, 4, 4), clip_size=(8, 16, 16)), (2, 2, 1)),
        TokenGrid(Pyramid(levels=3, patch_size=(3, 2, 2), clip_size=(3, 8, 8)), (1, 1, 1)),
        TokenGrid(Pyramid(levels=3, patch_size=(4, 4, 4), clip_size=(4, 16, 36)), (2, 2, 2)),
        TokenGrid(Pyramid(levels=2, patch_size=(2, 3, 3), clip_size=(6, 9, 9)), (1, 3, 1)),
    ],
    ids=["all axes", "mixed tokens", "space only", "still long tokens", "by three"],
)
def test_the_support_box_holds_all_that_a_window_interpolates(grid):
    """Context from the box equals context from the whole level, for every legal window."""
    generator = torch.Generator().manual_seed(0)
    token_size = torch.tensor(grid.token_size)
    for child, parent in level_pairs(grid):
        sides = [
            torch.arange(size - patch + 1)
            for size, patch in zip(grid.pyramid.size(child), grid.pyramid.patch_size, strict=True)
        ]
        offsets = torch.cartesian_prod(*sides)
        whole = torch.randn(*grid.level_shape(parent), 2, generator=generator)
        low, shape = grid.support(child, offsets, parent)
        assert (low >= 0).all()
        assert (low + torch.tensor(shape) <= torch.tensor(grid.level_shape(parent))).all()
        boxes = torch.stack(
            [
                whole[t : t + shape[0], h : h + shape[1], w : w + shape[2]]
                for t, h, w in low.tolist()
            ]
        )
        of_boxes = sample_volume(
            boxes, grid.matrices(child, offsets, parent, low * token_size, shape)
        )
        origin = torch.zeros_like(offsets)
        of_whole = sample_volume(
            whole.expand(len(offsets), -1, -1, -1, -1),
            grid.matrices(child, offsets, parent, origin, grid.level_shape(parent)),
        )
        # Places relative to a box and to the level differ by fp32 rounding.
        torch.testing.assert_close(of_boxes, of_whole, rtol=0, atol=1e-5)


@ALL_GRIDS
def test_patches_come_back_from_their_tokens(grid):
    x = torch.arange(2 * 3 * prod(grid.pyramid.patch_size)).view(1, 2, 3, *grid.pyramid.patch_size)
    pixels = grid.cut(x)
    assert pixels.shape == (1, 2, grid.count, 3 * prod(grid.token_size))
    t, h, w = grid.token_size
    assert torch.equal(pixels[0, 1, 0], x[0, 1, :, :t, :h, :w].flatten())
    assert torch.equal(grid.join(pixels), x)


@ALL_GRIDS
def test_coordinates_are_places_in_the_clip(grid):
    offsets = windows(grid, 8, seed=4)
    for level in range(grid.pyramid.levels):
        places = token_places(grid, level, offsets[:, level], grid.shape)
        coordinates = grid.coordinates(level, offsets[:, level]).unflatten(1, grid.shape)
        assert (coordinates.abs() <= 1).all()
        for axis in range(3):
            expected = (2 * places[axis] / grid.pyramid.clip_size[axis] - 1).float()
            along = coordinates.movedim(1 + axis, 1)[:, :, 0, 0, axis]
            torch.testing.assert_close(along, expected)


def test_fusion_starts_as_the_identity_on_tokens():
    fusion = ContextFusion(8, 8, coordinates=True)
    fusion.init_weights(torch.Generator().manual_seed(0))
    tokens, context = torch.randn(2, 2, 3, 4, 8).unbind()
    assert (fusion(tokens, context, torch.rand(2, 3, 4, 3)) == tokens).all()
