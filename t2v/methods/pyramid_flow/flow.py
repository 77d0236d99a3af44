"""Pyramidal flow matching (Jin et al., ICLR 2025, arXiv 2410.05954): the path from noise to data
is cut into stages, each at its own resolution.

Stages and levels are numbered 0 = coarsest, a quarter or half of the side, to the last = full
resolution; the paper counts down. Sigma is the share of noise, 1 - sigma that of signal.
"""

import math
from itertools import pairwise
from typing import Annotated

import torch
from einops import reduce, repeat
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.strict import Strict

Frames = Float[Tensor, "batch channels frames height width"]
Coarse = Float[Tensor, "batch channels frames coarse_height coarse_width"]
Fine = Float[Tensor, "batch channels frames fine_height fine_width"]
PerSample = Float[Tensor, " batch"]

BLOCK = 4  # cells of a level that one cell of the next coarser one covers: 2 x 2
MOST_GAMMA = 1 / (BLOCK - 1)  # beyond it no noise has these correlations
CLOCK = 1000


class FlowConfig(Strict):
    """Where stages meet, and how noisy a stage starts after the jump from the coarser one."""

    joints: Annotated[tuple[float, ...], Field(strict=False, max_length=7)] = Field(
        default=(0.333, 0.666),
        description="shares of the path at which one stage ends and the next begins; one fewer "
        "than stages",
    )
    gamma: float = Field(
        default=1 / 3, gt=0, description="minus the correlation of a jump's noise inside a block"
    )
    shift: float = Field(
        default=1.0, gt=0, description="above 1: more of the path is spent at high noise"
    )

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.joints) + 1

    @property
    def signal(self) -> list[float]:
        """Share of signal at the end of each stage: e, of which the last is 1."""
        return [1 - shifted(1 - joint, self.shift) for joint in self.joints] + [1.0]

    @property
    def sigma_end(self) -> list[float]:
        """Share of noise at the end of each stage."""
        return [1 - e for e in self.signal]

    @property
    def sigma_start(self) -> list[float]:
        """Share of noise at the start of each stage: the jump rolls it back (eq. 26)."""
        return [1.0] + [1 - signal_after_jump(e, self.gamma) for e in self.signal[:-1]]

    @property
    def clock_edges(self) -> list[float]:
        """The clock at the start of each stage and at the end of the last: it falls from 1000 to
        1, in each stage by as much as the stage's share of all noise that is taken away."""
        lengths = [s - e for s, e in zip(self.sigma_start, self.sigma_end, strict=True)]
        ends = [sum(lengths[:stage]) / sum(lengths) for stage in range(self.stages + 1)]
        ticks = [min(int(CLOCK * end), CLOCK - 1) for end in ends]
        return [CLOCK * shifted(1 - tick / CLOCK, self.shift) for tick in ticks]

    @model_validator(mode="after")
    def _refuse_stages_that_do_not_follow(self) -> "FlowConfig":
        bounds = [0.0, *self.joints, 1.0]
        if any(high <= low for low, high in pairwise(bounds)):
            raise ValueError(
                f"joints: {list(self.joints)} is wrong because they do not rise from above 0 to "
                "below 1; order them, such as [0.333, 0.666]"
            )
        if self.gamma > MOST_GAMMA:
            raise ValueError(
                f"gamma: {self.gamma:g} is wrong because four cells cannot all have a correlation "
                f"of -{self.gamma:g}; use at most 1/3"
            )
        for stage, (start, end) in enumerate(zip(self.sigma_start, self.sigma_end, strict=True)):
            if start <= end:
                raise ValueError(
                    f"joints: {list(self.joints)} is wrong because stage {stage} would start with "
                    f"{start:.3f} noise and end with {end:.3f}; move joints {stage - 1} and "
                    f"{stage} apart"
                )
        return self


def shifted(sigma: float, shift: float) -> float:
    """A share of noise moved towards 1 (the resolution shift of Stable Diffusion 3)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def jump_scale(e: float, gamma: float) -> float:
    """alpha: what the jump from a stage that ends with signal `e` multiplies the state by, so that
    its noise becomes white (eq. 15 solved for the end; 1 / (2 - e) at gamma = 1/3)."""
    return 1 / (math.sqrt(1 + 1 / gamma) * (1 - e) + e)


def jump_noise(e: float, gamma: float) -> float:
    """beta: how much corrective noise the jump adds (eq. 15)."""
    return jump_scale(e, gamma) * (1 - e) / math.sqrt(gamma)


def signal_after_jump(e: float, gamma: float) -> float:
    """s = alpha * e: the share of signal with which the next stage starts (eq. 26)."""
    return jump_scale(e, gamma) * e


def down(x: Fine) -> Coarse:
    """Half the height and width: means of 2 x 2 cells."""
    return reduce(x, "b c t (h two) (w also) -> b c t h w", "mean", two=2, also=2)


def up(x: Coarse) -> Fine:
    """Twice the height and width: each cell four times (the nearest neighbour)."""
    return repeat(x, "b c t h w -> b c t (h two) (w also)", two=2, also=2)


def down_by(x: Fine, levels: int) -> Coarse:
    """`down` as often as there are levels to go."""
    for _ in range(levels):
        x = down(x)
    return x


def noise_down_by(z: Fine, levels: int) -> Coarse:
    """White noise of a coarser level out of finer white noise: means regain unit variance by the
    root of the block's size."""
    return down_by(z, levels) * math.sqrt(BLOCK) ** levels


def corrective_noise(z: Frames, gamma: float) -> Frames:
    """Noise with unit variance and correlation -gamma inside each block, out of white noise.

    The covariance (1 + gamma) I - gamma 11' has two eigenvalues: of the block's mean, and of what
    is left of it. At gamma = 1/3 the mean has none, and the blocks add up to zero.
    """
    mean = up(down(z))
    return math.sqrt(1 + gamma) * (z - mean) + math.sqrt(max(1 - (BLOCK - 1) * gamma, 0)) * mean


def jump(y: Coarse, z: Fine, flow: FlowConfig, stage: int) -> Fine:
    """From the end of the coarser stage to the start of `stage`, by white noise z (eq. 15):
    mean and covariance are those that the stage was trained to start from."""
    e = flow.signal[stage - 1]
    noise = corrective_noise(z, flow.gamma)
    return jump_scale(e, flow.gamma) * up(y) + jump_noise(e, flow.gamma) * noise


def stage_ends(x: Fine, z: Fine, flow: FlowConfig, stage: int) -> tuple[Coarse, Coarse]:
    """(start, end) of a stage for clean x and white z, both of full resolution; one noise for both
    ends (eqs. 9 and 10)."""
    levels = flow.stages - 1 - stage
    x_stage, z_stage = down_by(x, levels), noise_down_by(z, levels)
    start, end = flow.sigma_start[stage], flow.sigma_end[stage]
    blurred = up(down(x_stage)) if stage else torch.zeros_like(x_stage)
    return start * z_stage + (1 - start) * blurred, end * z_stage + (1 - end) * x_stage


def training_pair(
    x: Fine, z: Fine, r: PerSample, flow: FlowConfig, stage: int
) -> tuple[Coarse, Coarse]:
    """(state, velocity) at r, which is 1 at the stage's start and 0 at its end: the velocity is
    start - end, towards noise (the paper's with its sign turned)."""
    start, end = stage_ends(x, z, flow, stage)
    return torch.lerp(end, start, r[:, None, None, None, None]), start - end


def clock(r: PerSample, flow: FlowConfig, stage: int) -> PerSample:
    """What the network is told of time: unlike r it tells the stages apart."""
    high, low = flow.clock_edges[stage : stage + 2]
    return high - (high - low) * (1 - r)
