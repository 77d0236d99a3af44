"""From noise to a clip: noise levels, and steps along `dx / dsigma = (x - D / s) / sigma` with the
denoised clip D and the input scale s (EDM, Algorithm 1; Snap Video)."""

from dataclasses import dataclass
from math import expm1, log
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.hpdm.diffusion import DiffusionConfig

Canvas = Float[Tensor, "clips channels frames height width"]
SolverName = Literal["euler", "heun", "dpm++", "unipc"]
MULTISTEP = ("dpm++", "unipc")


class Denoiser(Protocol):
    """The clean clips that noisy ones stand for; the answer may be changed in place."""

    input_scale: float

    def __call__(self, x_noisy: Canvas, sigma: float, /) -> Canvas: ...


def noise_levels(config: DiffusionConfig, steps: int, level: int = 0) -> Float[Tensor, " sigmas"]:
    """Falling sigmas from a level's first to its last one, then 0 (EDM, eq. 5)."""
    last, first = config.level_range(level)
    if steps == 1:
        return torch.tensor([first, 0.0], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = first ** (1 / config.rho), last ** (1 / config.rho)
    sigmas = (high + ramp * (low - high)) ** config.rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def churned(sigma: float, churn: float, steps: int) -> float:
    """The noise level to which EDM's S_churn raises one before its step (Algorithm 2)."""
    return sigma * (1 + min(churn / steps, 2**0.5 - 1))


@dataclass(frozen=True)
class Point:
    """A clip on the trajectory, what it is a noisy version of (D / s), and its noise level."""

    x: Canvas
    target: Canvas
    sigma: float


class Solver:
    """The steps of one trajectory.

    `euler` and `heun`, two calls a step, are EDM's. `dpm++` is DPM-Solver++ (2M, arXiv 2211.01095),
    of second order at one call a step by the denoised clip of the step before. `unipc` (arXiv
    2302.04867, order 2, B2) then also corrects each step by the call that begins the next.
    """

    def __init__(self, name: SolverName) -> None:
        self.name = name
        self.past: list[Point] = []  # the last step's beginning, and the one before

    def step(self, denoiser: Denoiser, x_noisy: Canvas, sigma: float, following: float) -> Canvas:
        """From one noise level to the next."""
        target = denoiser(x_noisy, sigma).div_(denoiser.input_scale)
        if following == 0:
            return target
        if self.name in MULTISTEP:
            here = Point(x_noisy, target, sigma)
            if self.name == "unipc" and self.past:
                here = Point(corrected(*self.past, here=here), target, sigma)
            self.past = [here, *self.past[:1]]
            return extrapolated(*self.past, following=following)
        slope = target.neg_().add_(x_noisy).div_(sigma)
        reached = torch.add(x_noisy, slope, alpha=following - sigma)
        if self.name == "euler":
            return reached
        end_slope = (reached - denoiser(reached, following) / denoiser.input_scale) / following
        return x_noisy + (following - sigma) * (slope + end_slope) / 2


def extrapolated(here: Point, before: Point | None = None, *, following: float) -> Canvas:
    """The next clip where the target goes on as it changed since the step before; without one, as
    it is (DPM-Solver++, 2M)."""
    h = log(here.sigma / following)
    target = here.target
    if before is not None:
        target = torch.lerp(before.target, target, 1 + h / (2 * log(before.sigma / here.sigma)))
    return torch.add(here.x * (following / here.sigma), target, alpha=-expm1(-h))


def corrected(start: Point, before: Point | None = None, *, here: Point) -> Canvas:
    """The clip that was reached from `start`, once the target there is known (UniC-1 or 2)."""
    h = log(start.sigma / here.sigma)
    grown = expm1(-h)
    x = torch.add(start.x * (here.sigma / start.sigma), start.target, alpha=-grown)
    change = here.target - start.target
    if before is None:
        return x.add_(change, alpha=-grown / 2)
    # The two conditions of order: sums over changes and over changes times their distance.
    r = log(start.sigma / before.sigma) / h
    first = -grown / h - 1
    second = -2 * first / h - 1
    old = (second - first) / (r - 1)
    x = x.add_(before.target - start.target, alpha=-old / r)
    return x.add_(change, alpha=old - first)
