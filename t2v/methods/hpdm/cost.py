"""What sampling and training cost by the number of latents: operations, without computing."""

from collections.abc import Sequence

import torch

from data_pipeline.feeding.config import Conditioning
from data_pipeline.pyramid import Pyramid
from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.network import CHANNELS, HPDM, PIXELS
from t2v.methods.hpdm.settings import Branch, HPDMSamplingConfig, calls_of_level, level_tilings
from t2v.methods.hpdm.solver import churned, noise_levels
from t2v.methods.method import Method
from t2v.network.conditioning import blank_condition
from t2v.network.flops import flops_of


def sampling_flops(
    model: HPDM, sampling: HPDMSamplingConfig, diffusion: DiffusionConfig, told: Conditioning
) -> list[int]:
    """Operations that one clip takes at each level: its denoising, and its reading for the finer
    ones. The model lies on the meta device."""
    pyramid = model.pyramid
    totals = []
    for level in range(pyramid.levels):
        tiles = branch_tiles(sampling, diffusion, pyramid, level)
        if level + 1 < pyramid.levels:
            # The first of two passes makes the latents that the second one sees.
            passes = 1 if model.self_conditioning is None else 2
            reading = passes * len(level_tilings(sampling, pyramid, level)[0])
            for branch in sampling.readers(level):
                tiles[branch] = tiles.get(branch, 0) + reading
        counts = {branch.latents or len(model.latents) for branch in tiles}
        flops = {count: tile_flops(model, level, count, told) for count in counts}
        totals.append(
            sum(
                many * flops[branch.latents or len(model.latents)] for branch, many in tiles.items()
            )
        )
    return totals


def branch_tiles(
    sampling: HPDMSamplingConfig, diffusion: DiffusionConfig, pyramid: Pyramid, level: int
) -> dict[Branch, int]:
    """Tiles that the denoising of one clip takes at a level under each of its branches."""
    sigmas = noise_levels(diffusion, sampling.steps[level], level).tolist()
    prompt, *guides = sampling.branches(level)
    tiles = dict.fromkeys((prompt, *guides), 0)
    for step, at, many in calls_of_level(sampling, pyramid, level):
        sigma = sigmas[at]
        if at == step and level == 0:
            sigma = churned(sigma, sampling.churn, sampling.steps[level])
        tiles[prompt] += many
        for guide in guides:
            tiles[guide] += many * sampling.guides_at(level, sigma)
    return tiles


def tile_flops(model: HPDM, level: int, num_latents: int, told: Conditioning) -> int:
    """Operations of a pass of one tile of a level, context of the coarser ones included."""
    with torch.device("meta"):
        corner = torch.zeros(1, 3, dtype=torch.long)
        kept = {}
        for block, coarser in model.config.context_features(level):
            grid = model.pixel_grid if block == PIXELS else model.grid
            dim = CHANNELS if block == PIXELS else model.config.feature_dim
            shape = grid.support(level, corner, coarser)[1]
            kept[block, coarser] = torch.zeros(1, *shape, dim)
        return flops_of(
            model,
            {
                "x": torch.zeros(1, 1, CHANNELS, *model.pyramid.patch_size),
                "noise": torch.zeros(1, 1),
                "offsets": corner[:, None],
                "condition": blank_condition(told),
                "num_latents": num_latents,
                "level": level,
                "kept": kept,
            },
        )


def mean_compute(method: Method, budget: Sequence[int]) -> float:
    """Operations of training with a drawn number of latents over those with all of them."""
    with torch.device("meta"):
        network, inputs = method.network(), method.inputs()
        flops = [flops_of(network, inputs | {"num_latents": count}) for count in budget]
    return sum(flops) / len(flops) / max(flops)
