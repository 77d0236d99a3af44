"""Coarse-to-fine generation: level 0 whole, then tiles of each finer level (paper, section 4.4).

A finished level is read once by the network, at a noise level near zero; the features of its blocks
are the context of every step and tile of the finer levels.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.memory import LevelRoom, plan_memory
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.settings import HPDMSamplingConfig, level_tilings
from t2v.methods.hpdm.store import Store
from t2v.methods.hpdm.tiles import (
    Canvas,
    FeatureVolumes,
    LevelNetwork,
    TiledDenoiser,
    read_level,
)
from t2v.methods.method import Team
from t2v.network.conditioning import Condition

ALONE = Team()
UNBOUNDED_BYTES = 1 << 62


class Denoiser(Protocol):
    """The clean clips that noisy ones stand for; the answer may be changed in place."""

    input_scale: float

    def __call__(self, x_noisy: Canvas, sigma: float, /) -> Canvas: ...


def noise_levels(config: DiffusionConfig, steps: int) -> Float[Tensor, " sigmas"]:
    """Falling sigmas from sigma_max to sigma_min, then 0 (EDM, eq. 5)."""
    if steps == 1:
        return torch.tensor([config.sigma_max, 0.0], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    sigmas = (high + ramp * (low - high)) ** config.rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def generate(
    model: HPDM,
    *,
    condition: Condition,
    null: Condition,
    seeds: list[int],
    sampling: HPDMSamplingConfig,
    diffusion: DiffusionConfig,
    rooms: list[LevelRoom] | None = None,
    store: Store | None = None,
    team: Team = ALONE,
    progress: Callable[[int], None] = lambda tiles: None,
) -> list[Canvas]:
    """Clips in [-1, 1] at every level, one per seed; `condition` and `null` have a row for each.

    The noise of a clip depends on its seed and the level alone, so neither the batch of tiles, nor
    the company of other clips, nor the processes that share them change it. `progress` is told the
    tiles that were denoised.
    """
    device, conditions = condition.fps.device, {"prompt": condition, "null": null}
    rooms = rooms or plan_memory(model, sampling, clips=len(seeds), device_bytes=UNBOUNDED_BYTES)
    volumes: FeatureVolumes = {}
    levels: list[Canvas] = []
    with contextlib.ExitStack() as stack:
        if store is None:
            store = stack.enter_context(contextlib.closing(Store(device)))
        for level, room in enumerate(rooms):
            network = partial(
                LevelNetwork, model, level, volumes=volumes, diffusion=diffusion, room=room,
                store=store, team=team,
            )  # fmt: skip
            denoised = network(branches=[conditions[name] for name in sampling.branches(level)])
            levels.append(sample_level(denoised, seeds, sampling, diffusion, progress))
            if level + 1 == len(rooms):
                break
            names = ("prompt", "null")[: sampling.read_branches(level)]
            reader = network(branches=[conditions[name] for name in names])
            tiling = level_tilings(sampling, model.pyramid, level)[0]
            volumes |= read_level(reader, tiling, levels[level])
            # A finer level runs fewer blocks: what it does not read makes room.
            volumes = {
                (block, coarser): kept
                for (block, coarser), kept in volumes.items()
                if level + 1 in model.config.fused_levels(block)
            }
    return levels


def sample_level(
    network: LevelNetwork,
    seeds: list[int],
    sampling: HPDMSamplingConfig,
    diffusion: DiffusionConfig,
    progress: Callable[[int], None],
) -> Canvas:
    """The clips of one level, from noise; its slabs, which share no tile, take turns."""
    level, pyramid = network.level, network.model.pyramid
    generators = [
        torch.Generator(network.device).manual_seed((seed * 64 + level) % 2**63) for seed in seeds
    ]

    def draw() -> Canvas:
        size = (3, *pyramid.size(level))
        return torch.stack(
            [torch.randn(size, generator=g, device=network.device) for g in generators]
        )

    sigmas = noise_levels(diffusion, sampling.steps[level]).tolist()
    whole = draw().mul_(sigmas[0])
    for slab in network.room.slabs:
        denoisers = [
            TiledDenoiser(
                network,
                tiling,
                slab,
                guidance_scale=sampling.level_guidance(level),
                progress=progress,
            )
            for tiling in level_tilings(sampling, pyramid, level)
        ]
        x_noisy = slab.of(whole)
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            if level == 0 and sampling.churn > 0:
                raised = sigma * (1 + min(sampling.churn / (len(sigmas) - 1), 2**0.5 - 1))
                x_noisy = x_noisy + (raised**2 - sigma**2) ** 0.5 * draw()
                sigma = raised
            x_noisy = denoising_step(
                denoisers[step % len(denoisers)],
                x_noisy,
                sigma,
                following,
                second_order=level == 0 and sampling.second_order,
            )
        slab.of(whole).copy_(x_noisy)
    return whole.mul_(network.input_scale).clamp_(-1, 1)


def denoising_step(
    denoiser: Denoiser,
    x_noisy: Canvas,
    sigma: float,
    following: float,
    *,
    second_order: bool,
) -> Canvas:
    """From one noise level to the next along `dx / dsigma = (x - D / input_scale) / sigma`: an
    Euler step, or Heun's (EDM, Algorithm 1, with the input scale of Snap Video)."""
    target = denoiser(x_noisy, sigma).div_(denoiser.input_scale)
    if following == 0:
        return target
    slope = target.neg_().add_(x_noisy).div_(sigma)
    reached = torch.add(x_noisy, slope, alpha=following - sigma)
    if not second_order:
        return reached
    end_slope = (reached - denoiser(reached, following) / denoiser.input_scale) / following
    return x_noisy + (following - sigma) * (slope + end_slope) / 2
