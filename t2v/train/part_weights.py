"""What each part of the loss, such as a level's, counts in the gradient."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from t2v.train.ema import half_life

Setting = Literal["uncertainty"] | list[Annotated[float, Field(gt=0)]] | None
NEWEST = half_life(100.0)


class PartWeights:
    """1, or given numbers, or what each part's uncertainty tells.

    Uncertainty weighting (Kendall et al., arXiv 1705.07115) has `loss / exp(u) + u` of each part in
    the place of its loss, and learns u. That is least where `exp(u)` is the loss itself, so `means`
    follow the losses, over all ranks, and a part counts one over its own: all are taught alike,
    whatever their scale.
    """

    def __init__(self, setting: Setting = None, parts: int = 1) -> None:
        self.learned = setting == "uncertainty"
        self.given = torch.tensor(setting if isinstance(setting, list) else 1.0)
        self.means = torch.zeros(parts)

    def on(self, device: torch.device) -> Float[Tensor, "*parts"]:
        """The weights of the next step; 1 before the first."""
        known = self.learned and bool(self.means.all())
        return (1 / self.means if known else self.given).to(device, non_blocking=True)

    def update(self, losses: Float[Tensor, " parts"], updates: int) -> None:
        """Take in the mean losses of update number `updates`, counted from 1."""
        self.means.lerp_(losses.to(self.means), NEWEST(updates))
