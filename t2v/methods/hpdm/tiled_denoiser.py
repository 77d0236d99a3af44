"""A level's clips and the network: denoised in tiles that overlap, or read for finer levels."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.hpdm.diffusion import c_in
from t2v.methods.hpdm.level_network import (
    LATENTS,
    Batch,
    FeatureVolumes,
    LevelNetwork,
    TileBatch,
    box,
)
from t2v.methods.hpdm.network import PIXELS, Latents
from t2v.methods.hpdm.settings import HPDMSamplingConfig, at_level
from t2v.methods.hpdm.solver import Canvas
from t2v.methods.hpdm.store import Box, Fetched, Kept
from t2v.methods.hpdm.tiling import Slab, Tiling, cut_tile


class TiledDenoiser:
    """The denoised clips of one slab of a level: the guided answers on overlapping tiles, averaged.

    Tiles see their latents of the step before. Given `coarse` clips, the average is moved to the
    nearest clips that shrink to these.
    """

    def __init__(
        self,
        network: LevelNetwork,
        tiling: Tiling,
        slab: Slab,
        *,
        sampling: HPDMSamplingConfig,
        coarse: Canvas | None = None,
        progress: Callable[[int], None] = lambda tiles: None,
    ) -> None:
        self.network, self.tiling, self.slab = network, tiling, slab
        self.sampling, self.progress = sampling, progress
        self.guidance_scale = sampling.level_guidance(network.level)
        self.rescale = at_level(sampling.guidance_rescale, network.level)
        self.input_scale = network.input_scale
        growth = network.model.pyramid.growth
        self.coarse = None if coarse is None else slab.shrunk(growth).of(coarse)
        self.batches = network.batches(tiling.inside(slab))
        self.latents: list[Kept] = []  # of each pass
        if network.model.self_conditioning is not None:
            dim, room = network.model.config.latent_dim, network.room
            mine = -(-len(self.batches) // network.team.size)
            for some in network.passes:
                shape = mine * network.rows_at_once * len(some.branches), some.latents, dim
                self.latents.append(network.store.keep(shape, room.dtype, room.latents))

    def __call__(self, x_noisy: Canvas, sigma: float) -> Canvas:
        """The clean clips, in [-1, 1], that the noisy ones stand for (MultiDiffusion average)."""
        average, patch = torch.zeros_like(x_noisy), self.tiling.patch
        batches = self.batches
        if not self.sampling.guides_at(self.network.level, sigma):
            batches = [batch.under(range(1)) for batch in batches]
        compute = partial(self._denoise, x_noisy, sigma)
        shape = x_noisy.shape[1], *patch
        for batch, _, tiles in self.network.shared(batches, self._given, compute, shape):
            for clip, number, tile in zip(batch.clips, batch.tiles, tiles, strict=True):
                place = cut_tile(average[clip], self.tiling.corner(number, self.slab), patch)
                place.addcmul_(tile, self.tiling.share(number).to(tile.device))
            self.progress(len(batch.tiles))
        average.clamp_(-1, 1)
        if self.coarse is not None:
            project(average, self.coarse, self.network.model.pyramid.growth)
        return average

    def _given(self, batch: Batch) -> Fetched:
        given = self.network.features(batch, self.tiling)
        for number, place in self._places(batch):
            given[LATENTS, number] = self.latents[number].read([place])[0][:, None]
        return given

    def _denoise(
        self, x_noisy: Canvas, sigma: float, batch: Batch, given: Fetched
    ) -> dict[int, TileBatch]:
        tiles = cut_tiles(x_noisy, batch, self.tiling, self.slab)
        answers, latents = self.network(tiles, batch, self.tiling, sigma, given)
        if places := self._places(batch):
            self.network.store.write_later(partial(self._keep, places, latents))
        if len(answers) == 1:
            return {0: answers[0]}
        guided = torch.lerp(answers[1], answers[0], self.guidance_scale)
        return {0: rescaled(guided, answers[0], self.rescale) if self.rescale else guided}

    def _keep(self, places: list[tuple[int, Box]], latents: list[Latents]) -> None:
        for number, place in places:
            self.latents[number].write(place, latents[number][:, 0])

    def _places(self, batch: Batch) -> list[tuple[int, Box]]:
        """(pass, where this process keeps its latents) of those that a batch goes through."""
        turn, most = batch.number // self.network.team.size, self.network.rows_at_once
        places: list[tuple[int, Box]] = []
        for number in range(len(self.latents)):
            branches = self.network.passes[number].branches
            if rows := batch.under(branches).rows:
                first = turn * most * len(branches)
                places.append((number, (slice(first, first + len(rows)),)))
        return places


def rescaled(guided: TileBatch, plain: TileBatch, share: float) -> TileBatch:
    """Guided tiles whose contrast is moved by a share to that of the unguided ones (arXiv
    2305.08891, eqs. 15 and 16).

    The standard deviations are those about a tile's mean, which stays: tiles may be flat, and
    scaled about zero they would lose their brightness.
    """
    axes = tuple(range(1, guided.dim()))
    mean = guided.mean(axes, keepdim=True)
    have = guided.std(axes, keepdim=True).clamp(min=1e-6)
    ratio = plain.std(axes, keepdim=True) / have
    return guided + (guided - mean) * (share * (ratio - 1))


def project(fine: Canvas, coarse: Canvas, growth: tuple[int, int, int]) -> None:
    """Move clips, in place, to the nearest ones that shrink to the coarse ones: what a block of
    pixels lacks is added to each (the null-space projection of DDNM, arXiv 2212.00490). Frames
    that shrinking leaves out stay as they are."""
    lacking = coarse - shrink(fine, growth)
    blocks(fine, growth).add_(lacking[:, :, :, :, None, :, None])


def shrink(fine: Canvas, growth: tuple[int, int, int]) -> Canvas:
    """Clips as the level before sees them: frames by stride, pixels by area average."""
    return blocks(fine, growth).mean(dim=(4, 6))


def blocks(
    fine: Canvas, growth: tuple[int, int, int]
) -> Float[Tensor, "clips channels frames height by_height width by_width"]:
    """Pixels by the pixel of the level before that shows them; memory is shared."""
    by_t, by_h, by_w = growth
    return fine[:, :, ::by_t].unflatten(4, (-1, by_w)).unflatten(3, (-1, by_h))


def read_level(
    network: LevelNetwork, tiling: Tiling, x_noisy: Canvas, sigma: float
) -> FeatureVolumes:
    """Inputs of the blocks that finer levels look at, over the whole of a finished level, at a
    noise level; tiles that overlap are averaged."""
    model, level = network.model, network.level
    config, grid = model.config, model.grid
    blocks, token_size = config.context_blocks(level), config.token_size
    shape = network.branches * network.clips, *grid.level_shape(level), config.feature_dim
    volumes = {
        (block, level): network.store.keep(shape, network.room.dtype, network.room.volumes)
        for block in blocks
    }
    whole = Slab(0, 0, tiling.size[0])
    if config.coarse_pixels:
        scales = x_noisy.new_full((1,), network.input_scale)
        seen = c_in(torch.full_like(scales, sigma), scales) * x_noisy
        shape = network.branches * network.clips, *tiling.size, x_noisy.shape[1]
        pixels = network.store.keep(shape, network.room.dtype, network.room.volumes)
        for branch in range(network.branches):
            rows = slice(branch * network.clips, (branch + 1) * network.clips)
            pixels.write((rows,), seen.movedim(1, 4))
        volumes[PIXELS, level] = pixels

    def compute(batch: Batch, given: Fetched) -> dict[int, Tensor]:
        """The first of two passes makes the latents that the second one sees, as in training."""
        inputs: dict[int, list[Tensor]] = {block: [] for block in blocks}

        def watch(block: int, features: Tensor) -> None:
            if block in blocks:
                rows = features[:, 0].unflatten(0, (-1, len(batch.tiles)))
                inputs[block].append(rows.transpose(0, 1).float())

        tiles = cut_tiles(x_noisy, batch, tiling, whole)
        if model.self_conditioning is not None:
            latents = network(tiles, batch, tiling, sigma, given)[1]
            given = given | {(LATENTS, number): last for number, last in enumerate(latents)}
        network(tiles, batch, tiling, sigma, given, watch)
        return {
            block: torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            for block, parts in inputs.items()
        }

    answers = network.shared(
        network.batches(list(range(len(tiling)))), lambda batch: network.features(batch, tiling),
        compute, (network.branches, grid.count, config.feature_dim), blocks,
    )  # fmt: skip
    for batch, block, features in answers:
        for row, number in enumerate(batch.tiles):
            share = tiling.share(number, token_size)[..., None].to(features.device)
            corner = (tiling.offsets[number] // torch.tensor(token_size)).tolist()
            places = batch.rows[row :: len(batch.tiles)]
            for place, tokens in zip(places, features[row], strict=True):
                tile = tokens.unflatten(0, grid.shape) * share
                volumes[block, level].add(box(place, corner, grid.shape), tile[None])
    network.store.settle()
    return volumes


def cut_tiles(canvas: Canvas, batch: Batch, tiling: Tiling, slab: Slab) -> TileBatch:
    """A batch's tiles of the canvas of a slab."""
    pairs = zip(batch.clips, batch.tiles, strict=True)
    return torch.stack(
        [cut_tile(canvas[clip], tiling.corner(tile, slab), tiling.patch) for clip, tile in pairs]
    )
