"""Diffusion on one level: preconditioning, noise levels and loss (Snap Video, arXiv 2402.14797).

`sigma_data` is 1 throughout. `input_scale` is the paper's input scaling factor: a clean patch `x`
in [-1, 1] is corrupted to `x / input_scale + sigma * noise`, so that finer levels, whose pixels are
more redundant, see relatively more noise.
"""

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.strict import Strict

PerSample = Float[Tensor, " batch"]
Patch = Float[Tensor, "batch channels frames height width"]


class DiffusionConfig(Strict):
    """Noise levels of training and sampling; the input scale of level l is
    `input_scale * input_scale_growth ** l`."""

    input_scale: float = Field(gt=0, description="input scaling factor of level 0")
    input_scale_growth: float = Field(ge=1, description="factor from one level to the next")
    sigma_mean: float = Field(default=-1.2, description="mean of ln sigma in training")
    sigma_std: float = Field(default=1.2, gt=0, description="standard deviation of ln sigma")
    sigma_min: float = Field(default=0.002, gt=0, description="last noise level of sampling")
    sigma_max: float = Field(default=80.0, gt=0, description="first noise level of sampling")
    rho: float = Field(default=7.0, gt=0, description="bend of the sampling schedule")

    @model_validator(mode="after")
    def _refuse_empty_range(self) -> "DiffusionConfig":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self

    def level_input_scale(self, level: int) -> float:
        """Input scaling factor of a level."""
        return self.input_scale * self.input_scale_growth**level


def add_noise(x: Patch, noise: Patch, sigma: PerSample, input_scale: PerSample) -> Patch:
    """`x_noisy = x / input_scale + sigma * noise`."""
    return x / _wide(input_scale) + _wide(sigma) * noise


def v_target(x: Patch, noise: Patch, sigma: PerSample) -> Patch:
    """Velocity `v = noise - sigma * x` (Snap Video, Table 1)."""
    return noise - _wide(sigma) * x


def x_from_v(x_noisy: Patch, v: Patch, sigma: PerSample, input_scale: PerSample) -> Patch:
    """The clean patch of a noisy one and its velocity; inverts `add_noise` and `v_target`.

    Solves `x_noisy = x / s + sigma * noise`, `v = noise - sigma * x` for x:
    `x = s * (x_noisy - sigma * v) / (1 + s * sigma^2)`.
    """
    s, sigma = _wide(input_scale), _wide(sigma)
    return s * (x_noisy - sigma * v) / (1 + s * sigma**2)


def c_in(sigma: PerSample, input_scale: PerSample) -> PerSample:
    """Factor that brings `x_noisy` to unit variance: `1 / sqrt(1 / s^2 + sigma^2)`."""
    return (input_scale**-2 + sigma**2).rsqrt()


def c_skip(sigma: PerSample, input_scale: PerSample) -> PerSample:
    """Share of `x_noisy` in the denoised patch: `s / (1 + s * sigma^2)`."""
    return input_scale / (1 + input_scale * sigma**2)


def c_out(sigma: PerSample, input_scale: PerSample) -> PerSample:
    """Share of the network's output in the denoised patch:
    `-s * sigma * sqrt(sigma^2 + 1) / (1 + s * sigma^2)`."""
    return -input_scale * sigma * (sigma**2 + 1).sqrt() / (1 + input_scale * sigma**2)


def c_nrm(sigma: PerSample) -> PerSample:
    """Factor that brings the velocity to unit variance: `1 / sqrt(sigma^2 + 1)`."""
    return (sigma**2 + 1).rsqrt()


def c_noise(sigma: PerSample) -> PerSample:
    """What the network is told of the noise level: `ln(sigma) / 4` (EDM, Table 1)."""
    return sigma.log() / 4


def denoised(x_noisy: Patch, output: Patch, sigma: PerSample, input_scale: PerSample) -> Patch:
    """The clean patch that the network's output stands for: `c_skip * x_noisy + c_out * output`."""
    skip, out = c_skip(sigma, input_scale), c_out(sigma, input_scale)
    return _wide(skip) * x_noisy + _wide(out) * output


def loss_weight(sigma: PerSample, input_scale: PerSample) -> PerSample:
    """Weight of the squared error of the network's output,
    `(sigma^2 + 1)^2 / (sigma^2 + 1 / s)^2` (Snap Video, Appendix D)."""
    return ((sigma**2 + 1) / (sigma**2 + 1 / input_scale)) ** 2


def draw_sigma(unit_normal: PerSample, config: DiffusionConfig) -> PerSample:
    """Training noise levels, `ln sigma ~ N(sigma_mean, sigma_std^2)`, from unit normal draws."""
    return torch.exp(config.sigma_mean + config.sigma_std * unit_normal)


def _wide(values: PerSample) -> Float[Tensor, "batch 1 1 1 1"]:
    return values[:, None, None, None, None]
