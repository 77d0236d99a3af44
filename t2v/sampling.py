"""Coarse-to-fine generation: level 0 whole, then tiles of each finer level (paper, section 4.4).

A finished level is read once by the network, at a noise level near zero; the features of its blocks
are the context of every step and tile of the finer levels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from data_pipeline.pyramid import Pyramid
from data_pipeline.strict import Strict
from t2v.diffusion import DiffusionConfig, c_in, c_noise, denoised
from t2v.model.conditioning import Condition
from t2v.tiling import add_tiles, blending_weights, cut_tiles, tile_offsets

if TYPE_CHECKING:
    from t2v.model.hpdm import HPDM

Canvas = Float[Tensor, "clips channels frames height width"]
FeatureVolumes = dict[tuple[int, int], Float[Tensor, "clips frames height width dim"]]


class SamplingConfig(Strict):
    """How a checkpoint turns prompts into clips; lists have one entry per level."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(
        description="sampling steps of each level; the paper: 128, 64, 32, 16"
    )
    guidance_scale: float = Field(default=1.0, ge=0, description="classifier-free; 1: none")
    overlap: Annotated[str, Field(pattern="^f?h?w?$")] = Field(
        default="hw", description="axes on which neighbouring tiles overlap by half: f, h, w"
    )
    second_order: bool = Field(default=True, description="Heun steps at level 0 (EDM, Algorithm 1)")
    churn: float = Field(
        default=0.0, ge=0, description="EDM's S_churn at level 0; 0: deterministic"
    )
    tile_batch: int = Field(default=16, ge=1, description="tiles per forward pass")
    weights: Literal["ema", "raw"] = "ema"
    fps: float = Field(default=24.0, ge=0, description="frame rate asked for; 0: a still image")
    original_size: Annotated[
        tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)
    ] = Field(default=(720, 1280), description="size of source media asked for: (height, width)")


def noise_levels(config: DiffusionConfig, steps: int) -> Float[Tensor, " sigmas"]:
    """Falling sigmas from sigma_max to sigma_min, then 0 (EDM, eq. 5)."""
    if steps == 1:
        return torch.tensor([config.sigma_max, 0.0], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    sigmas = (high + ramp * (low - high)) ** config.rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def network_calls(sampling: SamplingConfig, pyramid: Pyramid) -> list[int]:
    """Tiles that the denoising of one clip takes at each level, without guidance."""
    calls = []
    for level, steps in enumerate(sampling.steps):
        tiles = len(tile_offsets(pyramid.size(level), pyramid.patch_size, sampling.overlap))
        second_order = level == 0 and sampling.second_order
        calls.append((2 * steps - 1 if second_order else steps) * tiles)
    return calls


class TiledDenoiser:
    """The denoised clips of one level: the network's answers on overlapping tiles, averaged."""

    def __init__(
        self,
        model: "HPDM",
        level: int,
        *,
        condition: Condition,
        null: Condition,
        volumes: FeatureVolumes,
        sampling: SamplingConfig,
        diffusion: DiffusionConfig,
    ) -> None:
        self.model, self.level = model, level
        self.condition, self.null, self.volumes = condition, null, volumes
        self.guidance_scale, self.tile_batch = sampling.guidance_scale, sampling.tile_batch
        self.sigma_min = diffusion.sigma_min
        self.input_scale = diffusion.level_input_scale(level)
        self.size = model.pyramid.size(level)
        self.patch = model.pyramid.patch_size
        self.offsets = tile_offsets(self.size, self.patch, sampling.overlap)
        self._latents: dict[tuple[int, bool], Tensor] = {}

    def __call__(self, x_noisy: Canvas, sigma: float) -> Canvas:
        """The clean clips, in [-1, 1], that the noisy ones stand for (MultiDiffusion average)."""
        canvas = torch.zeros_like(x_noisy)
        for first, clips, offsets, tiles in self._batches(x_noisy):
            told = [self._network(first, tiles, clips, offsets, sigma, self.condition)[0]]
            if self.guidance_scale != 1:
                told.append(self._network(first, tiles, clips, offsets, sigma, self.null)[0])
                told = [torch.lerp(told[1], told[0], self.guidance_scale)]
            for row, clip in enumerate(clips.tolist()):
                add_tiles(canvas[clip], told[0][row, None], offsets[row, None])
        weights = blending_weights(self.offsets, self.patch, self.size).to(canvas.device)
        return (canvas * weights).clamp(-1, 1)

    def features(self, x: Canvas) -> FeatureVolumes:
        """Inputs of the blocks that finer levels look at, over the whole of a finished level.

        The network sees the clips at the smallest noise level, so they are the same at every step
        of the finer levels; tiles that overlap are averaged.
        """
        grid, blocks = self.model.grid, self.model.context_blocks(self.level)
        shape, token_size = grid.level_shape(self.level), torch.tensor(grid.token_size)
        volumes: FeatureVolumes = {}
        x_noisy = x / self.input_scale
        for first, clips, offsets, tiles in self._batches(x_noisy):
            look = partial(self._network, first, tiles, clips, offsets, self.sigma_min)
            _, inputs = look(self.condition)
            if self.model.self_conditioning is not None:
                _, inputs = look(self.condition)
            for block in blocks:
                tokens = inputs[block][:, 0].unflatten(1, grid.shape)
                key = (block, self.level)
                if key not in volumes:
                    volumes[key] = tokens.new_zeros(len(x), *shape, tokens.shape[-1])
                for row, clip in enumerate(clips.tolist()):
                    add_tiles(
                        volumes[key][clip].movedim(3, 0),
                        tokens[row].movedim(3, 0)[None],
                        offsets[row, None] // token_size,
                    )
        weights = blending_weights(self.offsets // token_size, grid.shape, shape)
        for volume in volumes.values():
            volume *= weights[..., None].to(volume.device)
        return volumes

    def _batches(
        self, canvas: Canvas
    ) -> Iterator[tuple[int, Int[Tensor, " rows"], Int[Tensor, "rows 3"], Tensor]]:
        """(first row, clip of each row, offset of each row, tiles) by batches of `tile_batch`."""
        tiles = len(self.offsets)
        for first in range(0, len(canvas) * tiles, self.tile_batch):
            rows = torch.arange(first, min(first + self.tile_batch, len(canvas) * tiles))
            clips, offsets = rows // tiles, self.offsets[rows % tiles]
            cut = [
                cut_tiles(canvas[clip], offset[None], self.patch)[0]
                for clip, offset in zip(clips.tolist(), offsets, strict=True)
            ]
            yield first, clips, offsets, torch.stack(cut)

    def _network(
        self,
        first: int,
        x_noisy: Float[Tensor, "rows channels frames height width"],
        clips: Int[Tensor, " rows"],
        offsets: Int[Tensor, "rows 3"],
        sigma: float,
        condition: Condition,
    ) -> tuple[Float[Tensor, "rows channels frames height width"], list[Tensor]]:
        """Denoised tiles and block inputs; remembers latents for self-conditioning."""
        device = x_noisy.device
        sigmas = torch.full((len(x_noisy),), sigma, device=device)
        scales = torch.full_like(sigmas, self.input_scale)
        scaled = c_in(sigmas, scales)[:, None, None, None, None] * x_noisy
        remembered = (first, condition is self.condition)
        output, latents, inputs = self.model.forward_level(
            self.level,
            scaled[:, None],
            c_noise(sigmas)[:, None],
            offsets.to(device),
            condition.rows(clips.to(device)),
            partial(self._slices, clips),
            self._latents.get(remembered),
        )
        if self.model.self_conditioning is not None:
            self._latents[remembered] = latents
        return denoised(x_noisy, output[:, 0], sigmas, scales), inputs

    def _slices(
        self,
        clips: Int[Tensor, " rows"],
        block: int,
        coarser: int,
        low: Int[Tensor, "rows 3"],
        shape: tuple[int, int, int],
    ) -> Float[Tensor, "rows frames height width dim"]:
        volume = self.volumes[block, coarser]
        rows = zip(clips.tolist(), low.tolist(), strict=True)
        return torch.stack(
            [
                volume[clip, t : t + shape[0], h : h + shape[1], w : w + shape[2]]
                for clip, (t, h, w) in rows
            ]
        )


@torch.no_grad()
def generate(
    model: "HPDM",
    *,
    condition: Condition,
    null: Condition,
    seeds: list[int],
    sampling: SamplingConfig,
    diffusion: DiffusionConfig,
    progress: Callable[[], None] = lambda: None,
) -> list[Canvas]:
    """Clips in [-1, 1] at every level, one per seed; `condition` and `null` have a row for each.

    The noise of a clip depends on its seed and the level alone, so neither the batch of tiles nor
    the company of other clips changes it.
    """
    volumes: FeatureVolumes = {}
    levels: list[Canvas] = []
    for level in range(model.pyramid.levels):
        denoiser = TiledDenoiser(
            model,
            level,
            condition=condition,
            null=null,
            volumes=volumes,
            sampling=sampling,
            diffusion=diffusion,
        )
        device = condition.fps.device
        generators = [
            torch.Generator(device).manual_seed((seed * 64 + level) % 2**63) for seed in seeds
        ]
        sigmas = noise_levels(diffusion, sampling.steps[level])
        x_noisy = _noise(model, level, generators, device) * float(sigmas[0])
        for sigma, following in pairwise(sigmas.tolist()):
            if level == 0 and sampling.churn > 0:
                raised = sigma * (1 + min(sampling.churn / (len(sigmas) - 1), 2**0.5 - 1))
                noise = _noise(model, level, generators, device)
                x_noisy = x_noisy + (raised**2 - sigma**2) ** 0.5 * noise
                sigma = raised
            second_order = level == 0 and sampling.second_order and following > 0
            x_noisy = denoising_step(denoiser, x_noisy, sigma, following, second_order=second_order)
            progress()
        clips = (x_noisy * denoiser.input_scale).clamp(-1, 1)
        levels.append(clips)
        if level + 1 < model.pyramid.levels:
            volumes |= denoiser.features(clips)
    return levels


def denoising_step(
    denoiser: TiledDenoiser,
    x_noisy: Canvas,
    sigma: float,
    following: float,
    *,
    second_order: bool,
) -> Canvas:
    """From one noise level to the next along `dx / dsigma = (x - D / input_scale) / sigma`: an
    Euler step, or Heun's (EDM, Algorithm 1, with the input scale of Snap Video)."""
    slope = (x_noisy - denoiser(x_noisy, sigma) / denoiser.input_scale) / sigma
    reached = x_noisy + (following - sigma) * slope
    if not second_order:
        return reached
    end_slope = (reached - denoiser(reached, following) / denoiser.input_scale) / following
    return x_noisy + (following - sigma) * (slope + end_slope) / 2


def _noise(
    model: "HPDM", level: int, generators: list[torch.Generator], device: torch.device
) -> Canvas:
    size = (3, *model.pyramid.size(level))
    return torch.stack([torch.randn(size, generator=g, device=device) for g in generators])
