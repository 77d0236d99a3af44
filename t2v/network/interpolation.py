"""Linear interpolation on grids of tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


def interpolation_matrix(
    places: Float[Tensor, "batch child"], count: int
) -> Float[Tensor, "batch child parent"]:
    """Weights of `count` grid points for linear interpolation at `places`, clamped at both ends."""
    places = places.clamp(0, count - 1)
    points = torch.arange(count, device=places.device)
    return (1 - (places[:, :, None] - points).abs()).clamp(min=0)
