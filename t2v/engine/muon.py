"""Muon (Jordan et al., 2024): a matrix moves along the nearest orthogonal one to its momentum."""

from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.engine.adamw import FreezableAdamW
from t2v.engine.place import Place

# Of `a x + b x^3 + c x^5`, which brings singular values near 1 in five turns.
QUINTIC = (3.4445, -4.7750, 2.0315)
TURNS = 5

Matrix = Float[Tensor, "rows columns"]


class Muon(FreezableAdamW):
    """Groups with `orthogonal` move by Muon, the others by AdamW.

    Orthogonalising needs whole matrices: each is put together from all parts by `sum_over_parts`,
    and every rank computes the same update and takes its own part of it. Updates have the size of
    AdamW's, `0.2 sqrt(max(rows, columns))` (arXiv 2502.16982, section 2.2), so its rates serve.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        *,
        sum_over_parts: Callable[[Tensor], Tensor],
        **settings: Any,
    ) -> None:
        super().__init__(groups, lr, **settings)
        self.sum_over_parts = sum_over_parts

    def move(self, group: dict[str, Any]) -> None:
        if not group["orthogonal"]:
            return super().move(group)
        momentum, rate = group["betas"][0], group["lr"]
        for part, place in zip(group["params"], group["places"], strict=True):
            average = self.state[part]["exp_avg"].lerp_(part.grad, 1 - momentum)
            ahead = self._whole(part.grad.lerp(average, momentum), place)
            update = orthogonal(ahead).flatten()[place.offset : place.offset + part.numel()]
            part.mul_(1 - rate * group["weight_decay"])
            part.sub_(update.view_as(part), alpha=0.2 * sqrt(max(ahead.shape)) * rate)
        self.state[group["params"][0]]["step"] += 1

    def _whole(self, part: Tensor, place: Place) -> Matrix:
        """A matrix from all ranks' parts of it: each adds its own to zeros."""
        whole = part.new_zeros(prod(place.shape))
        whole[place.offset : place.offset + part.numel()] = part.flatten()
        return self.sum_over_parts(whole).view(place.shape[0], -1)


def orthogonal(matrix: Matrix) -> Matrix:
    """`U V^T` of the singular value decomposition, roughly: singular values end within 0.68 to 1.13
    (Newton-Schulz). In fp32, so that every engine moves alike."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(TURNS):
        square = x @ x.T
        x = a * x + torch.addmm(square, square, square, beta=b, alpha=c) @ x
    return x.T if tall else x
