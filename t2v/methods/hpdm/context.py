"""Deep context fusion: features of coarser levels, sampled at a finer window (paper, eqs. 7 to 9).

Windows are axis-aligned boxes, so trilinear sampling separates into three small interpolation
matrices. Space is aligned at pixel centres; time, whose frames are taken by stride, at frame
starts: every even frame of a child coincides with a frame of its parent. Both clamp at the border.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from data_pipeline.pyramid import Pyramid
from t2v.network.interpolation import interpolation_matrix

Patches = Float[Tensor, "batch levels channels frames height width"]
TokenPixels = Float[Tensor, "batch levels tokens token_pixels"]
Volume = Float[Tensor, "batch frames height width dim"]
Matrix = Float[Tensor, "batch child parent"]


class TokenGrid:
    """Where the tokens of each level lie in the clip."""

    def __init__(self, pyramid: Pyramid, token_size: tuple[int, int, int]) -> None:
        self.pyramid = pyramid
        self.token_size = token_size
        self.shape = _divided(pyramid.patch_size, token_size)
        self.count = self.shape[0] * self.shape[1] * self.shape[2]

    def cut(self, x: Patches) -> TokenPixels:
        """Patches as tokens, each the values of its pixels."""
        t, h, w = self.token_size
        return rearrange(x, "b l c (f t) (y h) (x w) -> b l (f y x) (c t h w)", t=t, h=h, w=w)

    def join(self, pixels: TokenPixels) -> Patches:
        """The patches that tokens were cut from."""
        (t, h, w), (f, y, _) = self.token_size, self.shape
        return rearrange(
            pixels, "b l (f y x) (c t h w) -> b l c (f t) (y h) (x w)", f=f, y=y, t=t, h=h, w=w
        )

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """(frames, height, width) in tokens of the whole clip at a level."""
        return _divided(self.pyramid.size(level), self.token_size)

    def centers(
        self, level: int, offsets: Int[Tensor, "batch 3"], axis: int
    ) -> Float[Tensor, "batch tokens"]:
        """Places of a window's tokens along an axis, in pixels of the finest level."""
        token, stride = self.token_size[axis], self.pyramid.stride(level)[axis]
        index = torch.arange(self.shape[axis], device=offsets.device)
        return (offsets[:, axis, None] + index * token + _anchor(token, axis)) * float(stride)

    def coordinates(
        self, level: int, offsets: Int[Tensor, "batch 3"]
    ) -> Float[Tensor, "batch tokens 3"]:
        """Each token's place in the clip, (frames, height, width) in [-1, 1] (paper, eq. 9)."""
        t, h, w = (
            2 * self.centers(level, offsets, axis) / self.pyramid.clip_size[axis] - 1
            for axis in range(3)
        )
        grid = torch.broadcast_tensors(t[:, :, None, None], h[:, None, :, None], w[:, None, None])
        return torch.stack(grid, dim=4).flatten(1, 3)

    def support(
        self, child: int, child_offsets: Int[Tensor, "batch 3"], parent: int
    ) -> tuple[Int[Tensor, "batch 3"], tuple[int, int, int]]:
        """(first token, shape) of the box of parent tokens that a child window interpolates."""
        whole = self.level_shape(parent)

        def box(axis: int) -> tuple[Int[Tensor, " batch"], int]:
            token, fine = self.token_size[axis], self.pyramid.stride(child)[axis]
            coarse = self.pyramid.stride(parent)[axis]
            first = self.centers(child, child_offsets, axis)[:, 0] / coarse
            place = (first - _anchor(token, axis)) / token
            # Two more than the span of the window where its ends fall between parent tokens.
            span = (self.shape[axis] - 1) * fine // coarse
            count = min(span + 2 + (fine < coarse), whole[axis])
            return place.floor().long().clamp(0, whole[axis] - count), count

        (t, frames), (h, height), (w, width) = box(0), box(1), box(2)
        return torch.stack([t, h, w], dim=1), (frames, height, width)

    def matrices(
        self,
        child: int,
        child_offsets: Int[Tensor, "batch 3"],
        parent: int,
        parent_offsets: Int[Tensor, "batch 3"],
        parent_shape: tuple[int, int, int],
    ) -> tuple[Matrix, Matrix, Matrix]:
        """Linear interpolation from a grid of parent tokens to a child window, per axis.

        The grid is one parent window (training) or the whole parent level at offset 0 (sampling).
        """

        def matrix(axis: int) -> Matrix:
            token, stride = self.token_size[axis], self.pyramid.stride(parent)[axis]
            pixels = self.centers(child, child_offsets, axis) / stride
            place = (pixels - parent_offsets[:, axis, None] - _anchor(token, axis)) / token
            return interpolation_matrix(place, parent_shape[axis])

        return matrix(0), matrix(1), matrix(2)


def sample_volume(
    volume: Volume, matrices: tuple[Matrix, Matrix, Matrix]
) -> Float[Tensor, "batch tokens dim"]:
    """Trilinear samples of a feature volume: one matrix product per axis."""
    frames, height, width = (matrix.to(volume.dtype) for matrix in matrices)
    b, t, h, w, d = volume.shape
    volume = torch.matmul(frames, volume.reshape(b, t, h * w * d)).unflatten(2, (h, w * d))
    volume = torch.matmul(height[:, None], volume).unflatten(3, (w, d))
    volume = torch.matmul(width[:, None, None], volume)
    return rearrange(volume, "b t h w d -> b (t h w) d")


class Context:
    """Means of coarser levels' features at the windows of the levels that pass together (eq. 8).

    `looks` gives, for each of these, the coarser levels it looks at. One that passes with it shows
    the features of its own window. Of a finished one, `kept[block, level]` are boxes of features,
    cut where `TokenGrid.support` says for the one level that passes.
    """

    def __init__(
        self,
        grid: TokenGrid,
        looks: Mapping[int, Sequence[int]],
        offsets: Int[Tensor, "batch levels 3"],
        kept: Mapping[tuple[int, int], Volume],
    ) -> None:
        self.grid, self.looks, self.kept = grid, looks, kept
        self.index = {level: index for index, level in enumerate(looks)}
        windows = {level: offsets[:, index] for level, index in self.index.items()}
        self.coordinates = {level: grid.coordinates(level, windows[level]) for level in looks}
        self.matrices: dict[tuple[int, int], tuple[Matrix, Matrix, Matrix]] = {}
        for level, window in windows.items():
            for coarser in looks[level]:
                if coarser in windows:
                    low, shape = windows[coarser], grid.shape
                else:
                    first, shape = grid.support(level, window, coarser)
                    low = first * first.new_tensor(grid.token_size)
                self.matrices[level, coarser] = grid.matrices(level, window, coarser, low, shape)

    def __call__(
        self,
        block: int,
        levels: Sequence[int],
        features: Float[Tensor, "batch passing tokens dim"],
    ) -> tuple[Float[Tensor, "batch levels tokens dim"], Float[Tensor, "batch levels tokens 3"]]:
        """Context and coordinates of some `levels` before a block, to which all that pass bring
        `features`."""
        return (
            torch.stack([self._mean(block, level, features) for level in levels], dim=1),
            torch.stack([self.coordinates[level] for level in levels], dim=1),
        )

    def _mean(
        self, block: int, level: int, features: Float[Tensor, "batch passing tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        samples = []
        for coarser in self.looks[level]:
            if coarser in self.index:
                volume = features[:, self.index[coarser]].unflatten(1, self.grid.shape)
            else:
                volume = self.kept[block, coarser]
            samples.append(sample_volume(volume, self.matrices[level, coarser]))
        return torch.stack(samples).mean(0) if len(samples) > 1 else samples[0]


class ContextFusion(nn.Module):
    """`linear([tokens, context, coordinates])` (paper, eq. 9); starts as the identity on tokens."""

    def __init__(self, dim: int, context_dim: int, coordinates: bool) -> None:
        super().__init__()
        self.uses_coordinates = coordinates
        self.linear = nn.Linear(dim + context_dim + (3 if coordinates else 0), dim)

    def forward(
        self,
        tokens: Float[Tensor, "batch levels tokens dim"],
        context: Float[Tensor, "batch levels tokens context_dim"],
        coordinates: Float[Tensor, "batch levels tokens 3"],
    ) -> Float[Tensor, "batch levels tokens dim"]:
        parts = [tokens, context.to(tokens.dtype)]
        if self.uses_coordinates:
            parts.append(coordinates.to(tokens.dtype))
        return self.linear(torch.cat(parts, dim=3))

    def init_weights(self, generator: torch.Generator) -> None:
        """`[identity | 0 | 0]`: a warm-started finer level begins as its base without context."""
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.linear.weight)
        dim = self.linear.out_features
        with torch.no_grad():
            self.linear.weight[:, :dim].copy_(torch.eye(dim))


def _divided(sizes: tuple[int, int, int], units: tuple[int, int, int]) -> tuple[int, int, int]:
    return sizes[0] // units[0], sizes[1] // units[1], sizes[2] // units[2]


def _anchor(token: int, axis: int) -> float:
    """Place of a token's value inside it, in its level's pixels: frame starts, pixel centres."""
    return (token - 1) / 2 if axis == 0 else token / 2
