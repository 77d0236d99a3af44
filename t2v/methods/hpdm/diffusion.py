"""Diffusion on one level: preconditioning, noise levels and loss (Snap Video, arXiv 2402.14797).

`sigma_data` is 1 throughout. `input_scale` is the paper's input scaling factor: a clean patch `x`
in [-1, 1] is corrupted to `x / input_scale + sigma * noise`, so that finer levels, whose pixels are
more redundant, see relatively more noise.
"""

from math import log
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.strict import Share, Strict

Weighting = Literal["edm", "min_snr", "sigmoid"]
MOST_SNR = 5.0  # gamma of min-SNR (arXiv 2303.09556)

PerSample = Float[Tensor, " batch"]
Patch = Float[Tensor, "batch channels frames height width"]


class DiffusionConfig(Strict):
    """Noise levels of training and sampling; the input scale of level l is
    `input_scale * input_scale_growth ** l`.

    Noise of sigma at level l drowns a pixel as noise of `sigma * growth ** l` does at level 0. What
    follows the input scale by 1 is the same at every level in these units, by 0 (the paper, as far
    as it is published) in units of sigma.
    """

    input_scale: float = Field(gt=0, description="input scaling factor of level 0")
    input_scale_growth: float = Field(ge=1, description="factor from one level to the next")
    sigma_mean: float = Field(default=-1.2, description="mean of ln sigma in training")
    sigma_std: float = Field(default=1.2, gt=0, description="standard deviation of ln sigma")
    sigma_min: float = Field(default=0.002, gt=0, description="last noise level of sampling")
    sigma_max: float = Field(default=80.0, gt=0, description="first noise level of sampling")
    rho: float = Field(default=7.0, gt=0, description="bend of the sampling schedule")
    noise_follows_scale: Share = Field(
        default=0.0, description="of training's noise levels: 0: alike at all levels; 1: in pixels"
    )
    weight_follows_scale: Share = Field(default=0.0, description="of the loss weight, likewise")
    weighting: Weighting = Field(
        default="edm",
        description="of the loss by noise: EDM's, min-SNR's (gamma 5), or a sigmoid in ln SNR",
    )
    sigmoid_bias: float = Field(default=0.0, description="sigmoid: ln of the SNR where it bends")
    range_follows_scale: Share = Field(
        default=0.0, description="of sampling's first and last noise level, likewise"
    )
    coarse_noise: Literal["independent", "low"] = Field(
        default="independent",
        description="low: coarser levels have little noise where a sample teaches a finer one",
    )
    coarse_noise_quantile: float = Field(
        default=0.2, gt=0, le=1, description="low: below this quantile of a level's noise"
    )
    coarse_noise_share: Share = Field(
        default=0.5, description="low: in this share of samples; independent in the others"
    )

    @model_validator(mode="after")
    def _refuse_empty_range(self) -> "DiffusionConfig":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self

    def level_input_scale(self, level: int) -> float:
        """Input scaling factor of a level."""
        return self.input_scale * self.input_scale_growth**level

    def level_sigma_mean(self, level: int) -> float:
        """Mean of ln sigma in training at a level."""
        return self.sigma_mean - self.noise_follows_scale * level * log(self.input_scale_growth)

    def level_range(self, level: int) -> tuple[float, float]:
        """(last, first) noise level of sampling at a level."""
        ratio = self.input_scale_growth ** (level * self.range_follows_scale)
        return self.sigma_min / ratio, self.sigma_max / ratio

    def sigma_at(self, quantile: float, level: int) -> float:
        """The noise level of training below which this share of a level's samples lies."""
        normal = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64))
        return float(torch.exp(self.level_sigma_mean(level) + self.sigma_std * normal))


def add_noise(x: Patch, noise: Patch, sigma: PerSample, input_scale: PerSample) -> Patch:
    """`x_noisy = x / input_scale + sigma * noise`."""
    return x / wide(input_scale) + wide(sigma) * noise


def v_target(x: Patch, noise: Patch, sigma: PerSample) -> Patch:
    """Velocity `v = noise - sigma * x` (Snap Video, Table 1)."""
    return noise - wide(sigma) * x


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
    return wide(skip) * x_noisy + wide(out) * output


def loss_weight(
    sigma: PerSample,
    input_scale: PerSample,
    pixel_ratio: PerSample | float = 1.0,
    *,
    weighting: Weighting = "edm",
    bias: float = 0.0,
) -> PerSample:
    """Weight of the squared error of the network's output; EDM's is
    `(sigma^2 + 1)^2 / (sigma^2 + 1 / s)^2` (Snap Video, Appendix D).

    On the denoised patch that is `1 + SNR` with `SNR = 1 / (r * sigma)^2`, where `pixel_ratio` r is
    1. Instead, min-SNR's is `min(SNR, 5)` (arXiv 2303.09556), and the sigmoid's
    `SNR * sigmoid(bias - ln SNR)` (Simpler Diffusion, arXiv 2410.19324).
    """
    if weighting == "edm":
        relative = (sigma**2 + pixel_ratio**-2) / (sigma**2 + 1)
    else:
        snr = (pixel_ratio * sigma) ** -2
        most = snr.clamp(max=MOST_SNR)
        on_patch = most if weighting == "min_snr" else snr * torch.sigmoid(bias - snr.log())
        relative = on_patch * sigma**2 / (sigma**2 + 1)
    return ((sigma**2 + 1) / (sigma**2 + 1 / input_scale)) ** 2 * relative


def training_sigmas(
    unit_normal: Float[Tensor, "*batch levels"], config: DiffusionConfig
) -> Float[Tensor, "*batch levels"]:
    """Training noise levels of levels 0 and on, `ln sigma ~ N(mean, sigma_std^2)` with each level's
    own mean, from unit normal draws."""
    means = [config.level_sigma_mean(level) for level in range(unit_normal.shape[-1])]
    return torch.exp(unit_normal.new_tensor(means) + config.sigma_std * unit_normal)


def lowered(
    unit_normal: Float[Tensor, "batch levels"], taught: Float[Tensor, " batch"], quantile: float
) -> Float[Tensor, "batch levels"]:
    """Draws of the levels below each sample's `taught` one squeezed into the distribution's lowest
    part: a draw's share of the normal distribution becomes `quantile` times what it was."""
    levels = torch.arange(unit_normal.shape[1], device=unit_normal.device)
    low = torch.special.ndtri(quantile * torch.special.ndtr(unit_normal.double()))
    return torch.where(levels < taught[:, None], low.to(unit_normal.dtype), unit_normal)


def wide(values: PerSample) -> Float[Tensor, "batch 1 1 1 1"]:
    """A value per sample, ready to multiply patches."""
    return values[:, None, None, None, None]
