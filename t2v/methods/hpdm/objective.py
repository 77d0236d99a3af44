"""The training loss: every level denoises its own patch at its own noise level (paper, eq. 4)."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from data_pipeline.feeding.loader import Batch
from t2v.methods.hpdm.config import HPDMConfig
from t2v.methods.hpdm.diffusion import (
    add_noise,
    c_in,
    c_noise,
    c_nrm,
    loss_weight,
    lowered,
    training_sigmas,
    v_target,
    wide,
)
from t2v.methods.hpdm.network import CHANNELS
from t2v.methods.seeds import mix
from t2v.network.conditioning import Condition

Patches = Float[Tensor, "batch levels channels frames height width"]
BUDGET_KEY = 0x4255444745  # keeps a step's number of latents apart from the draws of samples


def level_losses(
    model: nn.Module, batch: Batch, config: HPDMConfig, *, seed: int, device: torch.device
) -> Float[Tensor, " levels"]:
    """Mean weighted squared error of each level; the loss is their sum.

    Noise, noise levels and self-conditioning are functions of (seed, sample number) alone, the
    number of latents is one of (seed, step): neither rank nor world size changes them.
    """
    shape = (config.pyramid.levels, CHANNELS, *config.pyramid.patch_size)
    noise, sigma, self_conditioned = draw_noise(
        config, batch.numbers, torch.Size(shape), seed=seed, device=device
    )
    budget = config.latent_budget
    latents = drawn_latents(budget, seed=seed, step=batch.step) if budget else None
    return weighted_errors(model, batch, config, noise, sigma, self_conditioned, latents).mean(0)


def drawn_latents(budget: Sequence[int], *, seed: int, step: int) -> int:
    """How many latents work in a step: one of the budget, each as likely."""
    return budget[mix(seed ^ BUDGET_KEY, step) % len(budget)]


def weighted_errors(
    model: nn.Module,
    batch: Batch,
    config: HPDMConfig,
    noise: Patches,
    sigma: Float[Tensor, "batch levels"],
    self_conditioned: Float[Tensor, " batch"],
    num_latents: int | None = None,
) -> Float[Tensor, "batch levels"]:
    """Weighted squared error of each sample's levels at given noise; 1 in `self_conditioned` lets
    a sample's pass see the latents of an earlier one. The first `num_latents` work, or all."""
    device = noise.device
    x = to_patches(batch.patches.to(device))
    diffusion, levels = config.diffusion, range(config.pyramid.levels)
    input_scale, pixel_ratio = torch.empty_like(sigma), torch.empty_like(sigma)
    for level in levels:
        input_scale[:, level].fill_(diffusion.level_input_scale(level))
        follows = level * diffusion.weight_follows_scale
        pixel_ratio[:, level].fill_(diffusion.input_scale_growth**follows)
    input_scale, pixel_ratio = input_scale.flatten(), pixel_ratio.flatten()
    flat_x, flat_noise, flat_sigma = x.flatten(0, 1), noise.flatten(0, 1), sigma.flatten()

    x_noisy = add_noise(flat_x, flat_noise, flat_sigma, input_scale)
    scaled = (wide(c_in(flat_sigma, input_scale)) * x_noisy).unflatten(0, sigma.shape)
    target = wide(c_nrm(flat_sigma)) * v_target(flat_x, flat_noise, flat_sigma)

    offsets = batch.offsets.to(device)
    condition = Condition.of(batch, device)
    told = c_noise(flat_sigma).view_as(sigma)
    previous = None
    if config.model.self_conditioning_rate > 0:
        with torch.no_grad():
            previous = model(scaled, told, offsets, condition, num_latents=num_latents)[1]
        previous = previous * self_conditioned[:, None, None, None]
    output, _ = model(scaled, told, offsets, condition, previous, num_latents=num_latents)

    error = (output.flatten(0, 1) - target).square().mean(dim=(1, 2, 3, 4))
    weight = loss_weight(
        flat_sigma,
        input_scale,
        pixel_ratio,
        weighting=diffusion.weighting,
        bias=diffusion.sigmoid_bias,
    )
    return (weight * error).unflatten(0, sigma.shape)


def to_patches(pixels: Int[Tensor, "batch levels frames height width channels"]) -> Patches:
    """Bytes -> [-1, 1], channels first."""
    return rearrange(pixels, "b l t h w c -> b l c t h w").float() / 127.5 - 1


def draw_noise(
    config: HPDMConfig,
    numbers: Int[Tensor, " batch"],
    shape: torch.Size,
    *,
    seed: int,
    device: torch.device,
) -> tuple[Patches, Float[Tensor, "batch levels"], Float[Tensor, " batch"]]:
    """(noise, sigma, 1 or 0 for self-conditioning) of each sample, from (seed, sample number)."""
    diffusion, levels = config.diffusion, shape[0]
    generator = torch.Generator(device)
    noise = torch.empty(len(numbers), *shape, device=device)
    normal = torch.empty(len(numbers), levels, device=device)
    chance = torch.empty(len(numbers), device=device)
    taught = torch.empty(len(numbers), device=device)
    for row, number in enumerate(numbers.tolist()):
        generator.manual_seed(mix(seed, number))
        noise[row].normal_(generator=generator)
        normal[row].normal_(generator=generator)
        chance[row].uniform_(generator=generator)
        taught[row].uniform_(generator=generator)
    if diffusion.coarse_noise == "low" and levels > 1:
        # Of those that teach a finer level above clean coarser ones, each finer level as often.
        taught = taught / max(diffusion.coarse_noise_share, 1e-9)
        finer = 1 + (taught * (levels - 1)).floor()
        normal = lowered(normal, finer * (taught < 1), diffusion.coarse_noise_quantile)
    sigma = training_sigmas(normal, diffusion)
    return noise, sigma, (chance < config.model.self_conditioning_rate).float()
