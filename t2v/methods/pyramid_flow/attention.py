"""Attention over units: full inside one, causal from one to the next; and where tokens are."""

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2v.network.layers import NORM_EPS

ROTARY_BASE = 10_000.0

Heads = Float[Tensor, "batch heads tokens channels"]
Places = Float[Tensor, "tokens 3"]
Turns = Float[Tensor, "2 tokens half_channels"]


@dataclass(frozen=True)
class Sight:
    """Which tokens of a sequence see which: the first `padding` of each row are seen by none, and
    a unit, which stops at its end, sees all up to there. Neighbours of one padding go together."""

    padding: tuple[int, ...]
    ends: tuple[int, ...]


@torch.compiler.disable
def attend(
    q: Heads, k: Heads, v: Heads, sight: Sight, dtype: torch.dtype | None = None
) -> Float[Tensor, "batch tokens dim"]:
    """Attention of each unit's queries over the keys up to its end; padding answers with zeros.
    It is computed in `dtype`, or in that of the values.

    What a unit sees is one stretch of keys, so there is no mask, and fused kernels (flash attention
    on a GPU) take each part. Left out of compiled blocks, which would else be compiled anew for
    every number of units.
    """
    own = v.dtype
    q, k, v = (x.to(dtype or own) for x in (q, k, v))
    parts, first = [], 0
    for padding, alike in groupby(sight.padding):
        rows = slice(first, first + len(list(alike)))
        parts.append(_attend(q[rows], k[rows], v[rows], padding, sight.ends))
        first = rows.stop
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rearrange(attended.to(own), "b h n d -> b n (h d)")


def _attend(q: Heads, k: Heads, v: Heads, padding: int, ends: tuple[int, ...]) -> Heads:
    parts = [torch.zeros_like(q[:, :, :padding])] if padding else []
    for start, end in pairwise((padding, *ends)):
        seen = slice(padding, end)
        parts.append(
            F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, seen], v[:, :, seen])
        )
    return torch.cat(parts, dim=2)


class HeadNorm(nn.Module):
    """Root-mean-square norm of each head's queries or keys, in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels))

    def forward(self, x: Heads) -> Heads:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * self.scale

    def init_weights(self, generator: torch.Generator) -> None:
        """Ones."""
        nn.init.ones_(self.scale)


def rotary_turns(places: Places, head_dim: int) -> Turns:
    """(cosine, sine) of the angles by which pairs of a head's channels are turned: a quarter of
    them by the frame, three eighths each by row and column (rotary positions on three axes)."""
    angles = []
    for axis, channels in enumerate((head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)):
        pairs = torch.arange(channels // 2, device=places.device, dtype=torch.float32)
        angles.append(places[:, axis, None] * ROTARY_BASE ** (-2 * pairs / channels))
    joined = torch.cat(angles, dim=1)
    return torch.stack([joined.cos(), joined.sin()])


def rotate(x: Heads, turns: Turns) -> Heads:
    """Pairs of channels, half a head apart, turned by their angles."""
    (cos, sin), (one, other) = turns, x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


def after_text(turns: Turns, text: int) -> Turns:
    """The same for a clip that comes after text, which is not turned."""
    unmoved = torch.cat([torch.ones_like(turns[:1, :1]), torch.zeros_like(turns[:1, :1])])
    return torch.cat([unmoved.expand(-1, text, -1), turns], dim=1)


def token_places(frames: slice, grid: tuple[int, int], stride: int, device: torch.device) -> Places:
    """(frame, row, column) of a piece's tokens, on the grid of the unit that is denoised; where
    the piece is `stride` times as coarse, the middles of its cells: 0.5, 2.5, ... for 2."""
    times = torch.arange(frames.start, frames.stop, device=device, dtype=torch.float32)
    sides = [
        (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * stride - 0.5
        for count in grid
    ]
    return torch.stack(torch.meshgrid(times, *sides, indexing="ij"), dim=-1).flatten(0, 2)
