"""The network at one level on tiles of clips: context, guidance pairs, self-conditioning, batches,
and the processes that share them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.hpdm.diffusion import DiffusionConfig, c_in, c_noise, denoised
from t2v.methods.hpdm.memory import LevelRoom
from t2v.methods.hpdm.network import HPDM, PIXELS, Latents
from t2v.methods.hpdm.settings import HPDMSamplingConfig
from t2v.methods.hpdm.solver import Canvas
from t2v.methods.hpdm.store import Box, Fetched, Kept, Store
from t2v.methods.hpdm.tiling import Slab, Tiling, cut_tile
from t2v.methods.method import Team
from t2v.network.conditioning import Condition

TileBatch = Float[Tensor, "rows channels tile_frames tile_height tile_width"]
# (block, coarser level) -> features of the whole level, by (branch and clip, frame, row, column).
FeatureVolumes = dict[tuple[int, int], Kept]


@dataclass(frozen=True)
class Batch:
    """Tiles that go through the network together: (clip, tile) of each.

    They go once for each branch; `rows` are their places among all branches' clips.
    """

    number: int
    clips: list[int]
    tiles: list[int]
    rows: list[int]

    @property
    def unguided(self) -> "Batch":
        """The same tiles under the first branch alone."""
        return replace(self, rows=self.rows[: len(self.tiles)])


class LevelNetwork:
    """The network on tiles of one level.

    `branches` are the conditions of one forward pass: the prompt's alone, or also the one that
    guidance leads away from, whose context was read under that same condition.
    """

    def __init__(
        self,
        model: HPDM,
        level: int,
        *,
        branches: list[Condition],
        volumes: FeatureVolumes,
        diffusion: DiffusionConfig,
        room: LevelRoom,
        store: Store,
        team: Team,
    ) -> None:
        self.model, self.level, self.room = model, level, room
        self.store, self.team = store, team
        self.clips, self.branches = len(branches[0].fps), len(branches)
        self.condition = joined(branches)
        self.volumes = {key: volumes[key] for key in model.config.context_features(level)}
        self.input_scale = diffusion.level_input_scale(level)
        self.device = branches[0].fps.device
        self.rows_at_once = max(1, room.tile_batch // self.branches)

    def batches(self, tiles: list[int]) -> list[Batch]:
        """Tiles of every clip, in the order in which they are added up."""
        pairs = [(clip, tile) for clip in range(self.clips) for tile in tiles]
        batches = []
        for first in range(0, len(pairs), self.rows_at_once):
            clips, numbers = zip(*pairs[first : first + self.rows_at_once], strict=True)
            rows = [branch * self.clips + clip for branch in range(self.branches) for clip in clips]
            batches.append(Batch(len(batches), list(clips), list(numbers), rows))
        return batches

    def features(self, batch: Batch, tiling: Tiling) -> Fetched:
        """The boxes of kept features that tiles look at."""
        boxes = {}
        for block, coarser in self.volumes:
            if (block == PIXELS, coarser) in boxes:
                continue
            grid = self.model.pixel_grid if block == PIXELS else self.model.grid
            low, shape = grid.support(self.level, tiling.offsets[batch.tiles], coarser)
            corners = zip(batch.rows, low.tolist() * self.branches, strict=False)
            places = [box(row, corner, shape) for row, corner in corners]
            boxes[block == PIXELS, coarser] = places
        return {
            (block, coarser): kept.read(boxes[block == PIXELS, coarser])[:, 0]
            for (block, coarser), kept in self.volumes.items()
        }

    def __call__(
        self,
        x_noisy: TileBatch,
        batch: Batch,
        tiling: Tiling,
        sigma: float,
        given: Fetched,
        watch: Callable[[int, Tensor], None] = lambda block, features: None,
    ) -> tuple[Float[Tensor, "branches rows channels frames height width"], Latents]:
        """Denoised tiles and last latents, given features and perhaps earlier latents."""
        branches = len(batch.rows) // len(batch.tiles)
        x_noisy = x_noisy.repeat(branches, 1, 1, 1, 1)
        sigmas = torch.full((len(x_noisy),), sigma, device=self.device)
        scales = torch.full_like(sigmas, self.input_scale)
        output, latents = self.model(
            (c_in(sigmas, scales)[:, None, None, None, None] * x_noisy)[:, None],
            c_noise(sigmas)[:, None],
            tiling.offsets[batch.tiles].repeat(branches, 1).to(self.device)[:, None],
            self.condition.rows(torch.tensor(batch.rows, device=self.device)),
            given.get("latents"),
            level=self.level,
            kept=given,
            watch=watch,
        )
        answers = denoised(x_noisy, output[:, 0], sigmas, scales)
        return answers.unflatten(0, (branches, -1)), latents

    def shared(
        self,
        batches: list[Batch],
        load: Callable[[Batch], Fetched],
        compute: Callable[[Batch, Fetched], dict[int, Tensor]],
        shape: tuple[int, ...],
        parts: Sequence[int] = (0,),
    ) -> Iterator[tuple[Batch, int, Tensor]]:
        """(batch, part, answer), the same on every member of the team, of which each loads, ahead,
        and computes its share of the batches.

        A batch is of the same rows however many share the work, so that its bytes are the same.
        """
        rank, size = self.team.rank, self.team.size
        mine = self.store.fetched(partial(load, batch) for batch in batches[rank::size])
        for first in range(0, len(batches), size):
            round_, answers = batches[first : first + size], {}
            if rank < len(round_):
                answers = compute(round_[rank], next(mine))
            for part in parts:
                answer = answers.pop(part, None)
                if size > 1 or answer is None:
                    answer = padded(answer, (self.rows_at_once, *shape), self.device)
                for batch, rows in zip(round_, self.team.gather(answer), strict=False):
                    yield batch, part, rows[: len(batch.tiles)]


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
        self.input_scale = network.input_scale
        growth = network.model.pyramid.growth
        self.coarse = None if coarse is None else slab.shrunk(growth).of(coarse)
        self.batches = network.batches(tiling.inside(slab))
        self.latents = None
        self.kept_rows = network.rows_at_once * network.branches
        if network.model.self_conditioning is not None:
            config = network.model.config
            mine = -(-len(self.batches) // network.team.size)
            shape = mine * self.kept_rows, config.num_latents, config.latent_dim
            self.latents = network.store.keep(shape, network.room.dtype, network.room.latents)

    def __call__(self, x_noisy: Canvas, sigma: float) -> Canvas:
        """The clean clips, in [-1, 1], that the noisy ones stand for (MultiDiffusion average)."""
        average, patch = torch.zeros_like(x_noisy), self.tiling.patch
        batches = self.batches
        if not self.sampling.guides_at(self.network.level, sigma):
            batches = [batch.unguided for batch in batches]
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
        if self.latents is not None:
            given["latents"] = self.latents.read([self._place(batch)])[0][:, None]
        return given

    def _denoise(
        self, x_noisy: Canvas, sigma: float, batch: Batch, given: Fetched
    ) -> dict[int, TileBatch]:
        tiles = cut_tiles(x_noisy, batch, self.tiling, self.slab)
        answers, latents = self.network(tiles, batch, self.tiling, sigma, given)
        if (kept := self.latents) is not None:
            place = self._place(batch)
            self.network.store.write_later(lambda: kept.write(place, latents[:, 0]))
        if len(answers) == 2:
            return {0: torch.lerp(answers[1], answers[0], self.guidance_scale)}
        return {0: answers[0]}

    def _place(self, batch: Batch) -> Box:
        """Where this process keeps a batch's latents."""
        first = batch.number // self.network.team.size * self.kept_rows
        return (slice(first, first + len(batch.rows)),)


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
        inputs: dict[int, Tensor] = {}

        def watch(block: int, features: Tensor) -> None:
            if block in blocks:
                rows = features[:, 0].unflatten(0, (network.branches, -1))
                inputs[block] = rows.transpose(0, 1).float()

        tiles = cut_tiles(x_noisy, batch, tiling, whole)
        if model.self_conditioning is not None:
            latents = network(tiles, batch, tiling, sigma, given)[1]
            given = given | {"latents": latents}
        network(tiles, batch, tiling, sigma, given, watch)
        return inputs

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


def joined(conditions: list[Condition]) -> Condition:
    """The rows of several conditions, one after the other."""
    names = [name for name, value in vars(conditions[0]).items() if value is not None]
    return replace(
        conditions[0],
        **{name: torch.cat([getattr(c, name) for c in conditions]) for name in names},
    )


def cut_tiles(canvas: Canvas, batch: Batch, tiling: Tiling, slab: Slab) -> TileBatch:
    """A batch's tiles of the canvas of a slab."""
    pairs = zip(batch.clips, batch.tiles, strict=True)
    return torch.stack(
        [cut_tile(canvas[clip], tiling.corner(tile, slab), tiling.patch) for clip, tile in pairs]
    )


def padded(rows: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows, or none, with zeros behind them."""
    full = torch.zeros(shape, device=device)
    if rows is not None:
        full[: len(rows)] = rows
    return full


def box(row: int, corner: list[int], shape: tuple[int, int, int]) -> Box:
    """Where features of one clip's window are kept."""
    sides = zip(corner, shape, strict=True)
    return (slice(row, row + 1), *(slice(low, low + side) for low, side in sides))
