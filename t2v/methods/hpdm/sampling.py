"""Coarse-to-fine generation: level 0 whole, then tiles of each finer level (paper, section 4.4).

A finished level is read once by the network, by default at a noise level near zero; the features of
its blocks are the context of every step and tile of the finer levels.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from data_pipeline.pyramid import Pyramid
from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.level_network import FeatureVolumes, LevelNetwork
from t2v.methods.hpdm.memory import LevelRoom, plan_memory
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.settings import Branch, HPDMSamplingConfig, level_tilings
from t2v.methods.hpdm.solver import Canvas, Solver, churned, noise_levels
from t2v.methods.hpdm.store import Store
from t2v.methods.hpdm.tiled_denoiser import TiledDenoiser, read_level, shrink
from t2v.methods.method import ALONE, Team
from t2v.network.conditioning import Condition

UNBOUNDED_BYTES = 1 << 62
READING = 32  # keeps the noise that is read apart from that of the levels, of which are at most 8


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
    given: Canvas | None = None,
    guide: HPDM | None = None,
) -> list[Canvas]:
    """Clips in [-1, 1] at every level, one per seed; `condition` and `null` have a row for each.
    Where clips of a coarser level are `given`, those of the levels below it are shrunk from them,
    and only finer ones are made. Guidance leads away from what the `guide` says, or the model
    itself.

    The noise of a clip depends on its seed and the level alone, so neither the batch of tiles, nor
    the company of other clips, nor the processes that share them change it. `progress` is told the
    tiles that were denoised.
    """
    known = [] if given is None else coarser_clips(given, model.pyramid)
    device, conditions = condition.fps.device, {"prompt": condition, "null": null}

    def told(branches: tuple[Branch, ...]) -> list[tuple[Condition, int | None]]:
        return [(conditions[branch.shows], branch.latents) for branch in branches]

    rooms = rooms or plan_memory(model, sampling, clips=len(seeds), device_bytes=UNBOUNDED_BYTES)
    volumes: FeatureVolumes = {}
    levels: list[Canvas] = []
    with contextlib.ExitStack() as stack:
        if store is None:
            store = stack.enter_context(contextlib.closing(Store(device)))
        for level, room in enumerate(rooms):
            network = partial(
                LevelNetwork, model, level, guide=guide, volumes=volumes, diffusion=diffusion,
                room=room, store=store, team=team,
            )  # fmt: skip
            if level < len(known):
                levels.append(known[level])
            else:
                denoised = network(branches=told(sampling.branches(level)))
                coarse = levels[-1] if levels and sampling.coarse_projection else None
                levels.append(sample_level(denoised, seeds, sampling, diffusion, progress, coarse))
            if level + 1 == len(rooms):
                break
            reader = network(branches=told(sampling.readers(level)))
            tiling = level_tilings(sampling, model.pyramid, level)[0]
            sigma = sampling.context.level_sigma(diffusion, level)
            x = levels[level] / reader.input_scale
            if sampling.context.noised:
                generators = noise_generators(reader, seeds, READING + level)
                x += draw(generators, (3, *model.pyramid.size(level))).mul_(sigma)
            volumes |= read_level(reader, tiling, x, sigma)
            # A finer level runs fewer blocks: what it does not read makes room.
            wanted = model.config.context_features(level + 1)
            volumes = {place: kept for place, kept in volumes.items() if place in wanted}
    return levels


def sample_level(
    network: LevelNetwork,
    seeds: list[int],
    sampling: HPDMSamplingConfig,
    diffusion: DiffusionConfig,
    progress: Callable[[int], None],
    coarse: Canvas | None = None,
) -> Canvas:
    """The clips of one level, from noise; its slabs, which share no tile, take turns. Given the
    `coarse` clips of the level before, they shrink to these."""
    level, pyramid = network.level, network.model.pyramid
    generators = noise_generators(network, seeds, level)
    size = (3, *pyramid.size(level))
    sigmas = noise_levels(diffusion, sampling.steps[level], level).tolist()
    whole = draw(generators, size).mul_(sigmas[0])
    for slab in network.room.slabs:
        denoisers = [
            TiledDenoiser(
                network, tiling, slab, sampling=sampling, coarse=coarse, progress=progress
            )
            for tiling in level_tilings(sampling, pyramid, level)
        ]
        x_noisy, solver = slab.of(whole), Solver(sampling.level_solver(level))
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            if level == 0 and sampling.churn > 0:
                raised = churned(sigma, sampling.churn, sampling.steps[level])
                x_noisy = x_noisy + (raised**2 - sigma**2) ** 0.5 * draw(generators, size)
                sigma = raised
            denoiser = denoisers[step % len(denoisers)]
            x_noisy = solver.step(denoiser, x_noisy, sigma, following)
        slab.of(whole).copy_(x_noisy)
    return whole.mul_(network.input_scale).clamp_(-1, 1)


def coarser_clips(given: Canvas, pyramid: Pyramid) -> list[Canvas]:
    """Clips of some level and, before them, of all coarser ones: as these see the same video."""
    sizes = [list(pyramid.size(n)) for n in range(pyramid.levels)]
    level = sizes.index(list(given.shape[2:]))
    clips = [given]
    for _ in range(level):
        clips.insert(0, shrink(clips[0], pyramid.growth))
    return clips


def noise_generators(network: LevelNetwork, seeds: list[int], place: int) -> list[torch.Generator]:
    """A source of noise for each clip: `place` is its level, or READING and the level."""
    return [
        torch.Generator(network.device).manual_seed((seed * 64 + place) % 2**63) for seed in seeds
    ]


def draw(generators: list[torch.Generator], size: tuple[int, ...]) -> Canvas:
    """Unit noise for each clip from its own source."""
    return torch.stack([torch.randn(size, generator=g, device=g.device) for g in generators])
