"""Fixed noise for the held-out loss, in the bin of each level of a sample at its turn."""

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.hpdm.config import HPDMConfig
from t2v.methods.hpdm.diffusion import DiffusionConfig, training_sigmas
from t2v.methods.hpdm.network import CHANNELS
from t2v.methods.hpdm.objective import Patches
from t2v.methods.seeds import HELD_OUT, mix


def fixed_noise(
    config: HPDMConfig,
    numbers: list[int],
    turns: list[int],
    places: list[list[int]],
    *,
    bins: int,
    seed: int,
) -> tuple[Patches, Float[Tensor, "batch levels"], Float[Tensor, " batch"]]:
    """(noise, sigma, 1 or 0 for self-conditioning), drawn on the CPU from (seed, sample, turn)."""
    shape = (config.pyramid.levels, CHANNELS, *config.pyramid.patch_size)
    noise, sigma = torch.empty(len(numbers), *shape), torch.empty(len(numbers), shape[0])
    chance = torch.empty(len(numbers))
    for row, (number, turn, of_levels) in enumerate(zip(numbers, turns, places, strict=True)):
        generator = torch.Generator().manual_seed(mix(mix(seed ^ HELD_OUT, number), turn))
        noise[row].normal_(generator=generator)
        within = torch.rand(shape[0], generator=generator, dtype=torch.float64)
        sigma[row] = sigma_at((torch.tensor(of_levels) + within) / bins, config.diffusion)
        chance[row].uniform_(generator=generator)
    return noise, sigma, (chance < config.model.self_conditioning_rate).float()


def sigma_at(
    quantile: Float[Tensor, "*batch levels"], diffusion: DiffusionConfig
) -> Float[Tensor, "*batch levels"]:
    """Noise levels of levels 0 and on at quantiles of the training distribution, short of its
    endless tails."""
    normal = torch.special.ndtri(quantile.double().clamp(1e-4, 1 - 1e-4))
    return training_sigmas(normal.float(), diffusion)
