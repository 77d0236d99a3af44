"""The network at one level on tiles of clips: context, guidance pairs, self-conditioning, batches,
and the processes that share them."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from t2v.methods.hpdm.diffusion import DiffusionConfig, c_in, c_noise, denoised
from t2v.methods.hpdm.memory import LevelRoom
from t2v.methods.hpdm.store import Box, Fetched, Kept, Store
from t2v.methods.hpdm.tiling import Slab, Tiling, cut_tile
from t2v.methods.method import Team
from t2v.network.conditioning import Condition

if TYPE_CHECKING:
    from t2v.methods.hpdm.network import HPDM

Canvas = Float[Tensor, "clips channels frames height width"]
TileBatch = Float[Tensor, "rows channels tile_frames tile_height tile_width"]
# (block, coarser level) -> features of the whole level, by (branch and clip, frame, row, column).
FeatureVolumes = dict[tuple[int, int], Kept]


@dataclass(frozen=True)
class Batch:
    """Tiles that go through the network together: (clip, tile) of each row."""

    number: int
    clips: list[int]
    tiles: list[int]


class LevelNetwork:
    """The network on tiles of one level.

    `branches` are the conditions of one forward pass: the prompt's alone, or also the one that
    guidance leads away from, whose context was read under that same condition.
    """

    def __init__(
        self,
        model: "HPDM",
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
        self.volumes = {
            (block, coarser): volumes[block, coarser]
            for block in range(len(model.config.levels_per_block))
            if level in model.fused_levels(block)
            for coarser in model.context_levels(level)
        }
        self.sigma_min = diffusion.sigma_min
        self.input_scale = diffusion.level_input_scale(level)
        self.device = branches[0].fps.device
        self.rows_at_once = max(1, room.tile_batch // self.branches)

    def batches(self, tiles: list[int]) -> list[Batch]:
        """Tiles of every clip, in the order in which they are added up."""
        rows = [(clip, tile) for clip in range(self.clips) for tile in tiles]
        batches = []
        for first in range(0, len(rows), self.rows_at_once):
            clips, numbers = zip(*rows[first : first + self.rows_at_once], strict=True)
            batches.append(Batch(len(batches), list(clips), list(numbers)))
        return batches

    def keep_latents(self, batches: list[Batch]) -> Kept | None:
        """Room for the latents of this process's batches, which see them again at the next step."""
        if self.model.self_conditioning is None:
            return None
        mine = -(-len(batches) // self.team.size) * self.rows_at_once * self.branches
        latents = self.model.config.num_latents, self.model.config.latent_dim
        return self.store.keep((mine, *latents), self.room.dtype, self.room.latents)

    def denoise(
        self,
        x_noisy: Canvas,
        sigma: float,
        guidance_scale: float,
        *,
        tiling: Tiling,
        origin: Slab,
        batches: list[Batch],
        latents: Kept | None,
    ) -> Iterator[tuple[Batch, TileBatch]]:
        """The guided answers on all tiles, batch by batch, the same on every member of the team.

        A batch is of the same rows however many share the work, so that its bytes are the same.
        """
        mine = self._fetched(batches, tiling, latents)
        for first in range(0, len(batches), self.team.size):
            round_ = batches[first : first + self.team.size]
            answer = x_noisy.new_zeros(self.rows_at_once, x_noisy.shape[1], *tiling.patch)
            if self.team.rank < len(round_):
                batch, context = round_[self.team.rank], next(mine)
                x = self._cut(x_noisy, batch, tiling, origin)
                told, new_latents, _ = self._network(x, batch, tiling, sigma, context)
                guided = told[0]
                if self.branches == 2:
                    guided = torch.lerp(told[1], told[0], guidance_scale)
                answer[: len(batch.tiles)] = guided
                if latents is not None:
                    self._remember(latents, batch, new_latents)
            for batch, answers in zip(round_, self.team.gather(answer), strict=False):
                yield batch, answers[: len(batch.tiles)]

    def read(
        self, x: Canvas, tiling: Tiling, blocks: Collection[int]
    ) -> Iterator[tuple[Batch, int, Float[Tensor, "branches rows tokens dim"]]]:
        """(batch, block, its inputs) over a finished level at the smallest noise level.

        The first of two passes makes the latents that the second one sees, as in training.
        """
        x_noisy = x / self.input_scale
        whole = Slab(0, 0, tiling.size[0])
        batches = self.batches(list(range(len(tiling))))
        mine = self._fetched(batches, tiling, None)
        for first in range(0, len(batches), self.team.size):
            round_ = batches[first : first + self.team.size]
            inputs: dict[int, Tensor] = {}
            if self.team.rank < len(round_):
                batch, context = round_[self.team.rank], next(mine)
                tiles = self._cut(x_noisy, batch, tiling, whole)
                if self.model.self_conditioning is not None:
                    _, made, _ = self._network(tiles, batch, tiling, self.sigma_min, context)
                    context = context | {"latents": made}
                inputs = self._network(
                    tiles, batch, tiling, self.sigma_min, context, wanted=blocks
                )[2]
            for block in blocks:
                part = self._padded(inputs.pop(block, None))
                for batch, tokens in zip(round_, self.team.gather(part), strict=False):
                    yield batch, block, tokens[:, : len(batch.tiles)]

    def _padded(self, tokens: Tensor | None) -> Float[Tensor, "branches rows tokens dim"]:
        """A batch's tokens at the size of a full batch; zeros for a member without a batch."""
        config = self.model.config
        dim = config.token_dim if config.fusion == "deep" else self.model.token_pixels
        shape = (self.branches, self.rows_at_once, self.model.grid.count, dim)
        if tokens is None:
            return torch.zeros(shape, device=self.device)
        tokens = tokens[:, 0].unflatten(0, (self.branches, -1)).float()
        if self.team.size == 1:
            return tokens
        padded = tokens.new_zeros(shape)
        padded[:, : tokens.shape[1]] = tokens
        return padded

    def _cut(self, canvas: Canvas, batch: Batch, tiling: Tiling, origin: Slab) -> TileBatch:
        parts = []
        for clip, tile in zip(batch.clips, batch.tiles, strict=True):
            offset = tiling.offsets[tile].tolist()
            offset[origin.axis] -= origin.low
            parts.append(cut_tile(canvas[clip], offset, tiling.patch))
        return torch.stack(parts)

    def _fetched(
        self, batches: list[Batch], tiling: Tiling, latents: Kept | None
    ) -> Iterator[Fetched]:
        """Context and earlier latents of this process's batches, fetched ahead."""
        mine = batches[self.team.rank :: self.team.size]

        def load(batch: Batch) -> Callable[[], Fetched]:
            return lambda: self._context(batch, tiling, latents)

        return self.store.fetched(load(batch) for batch in mine)

    def _context(self, batch: Batch, tiling: Tiling, latents: Kept | None) -> Fetched:
        offsets = tiling.offsets[batch.tiles]
        fetched: Fetched = {}
        rows = [
            branch * self.clips + clip for branch in range(self.branches) for clip in batch.clips
        ]
        for coarser in sorted({coarser for _, coarser in self.volumes}):
            low, shape = self.model.grid.support(self.level, offsets, coarser)
            boxes: list[Box] = [
                (slice(row, row + 1), *_box(corner, shape))
                for row, corner in zip(rows, low.tolist() * self.branches, strict=True)
            ]
            for (block, level), kept in self.volumes.items():
                if level == coarser:
                    fetched[block, level] = kept.read(boxes)[:, 0]
        if latents is not None:
            fetched["latents"] = latents.read([self._places(batch)])[0][:, None]
        return fetched

    def _places(self, batch: Batch) -> Box:
        """Where a batch's latents are kept."""
        first = batch.number // self.team.size * self.rows_at_once * self.branches
        return (slice(first, first + len(batch.tiles) * self.branches),)

    def _remember(self, kept: Kept, batch: Batch, latents: Tensor) -> None:
        self.store.write_later(lambda: kept.write(self._places(batch), latents[:, 0]))

    def _network(
        self,
        x_noisy: TileBatch,
        batch: Batch,
        tiling: Tiling,
        sigma: float,
        context: Fetched,
        *,
        wanted: Collection[int] = (),
    ) -> tuple[Float[Tensor, "branches rows channels frames height width"], Tensor, dict]:
        """Denoised tiles, latents, and inputs of the wanted blocks."""
        x_noisy = x_noisy.repeat(self.branches, 1, 1, 1, 1)
        sigmas = torch.full((len(x_noisy),), sigma, device=self.device)
        scales = torch.full_like(sigmas, self.input_scale)
        clips = torch.tensor(batch.clips, device=self.device)
        rows = torch.cat([clips + branch * self.clips for branch in range(self.branches)])
        output, latents, inputs = self.model.forward_level(
            self.level,
            (c_in(sigmas, scales)[:, None, None, None, None] * x_noisy)[:, None],
            c_noise(sigmas)[:, None],
            tiling.offsets[batch.tiles].repeat(self.branches, 1).to(self.device),
            self.condition.rows(rows),
            lambda block, coarser, *_: context[block, coarser],
            context.get("latents"),
            wanted,
        )
        answer = denoised(x_noisy, output[:, 0], sigmas, scales)
        return answer.unflatten(0, (self.branches, -1)), latents, inputs


class TiledDenoiser:
    """The denoised clips of one slab of a level: the answers on overlapping tiles, averaged."""

    def __init__(
        self,
        network: LevelNetwork,
        tiling: Tiling,
        slab: Slab,
        *,
        guidance_scale: float,
        progress: Callable[[int], None] = lambda tiles: None,
    ) -> None:
        self.network, self.tiling, self.slab = network, tiling, slab
        self.guidance_scale, self.progress = guidance_scale, progress
        self.input_scale = network.input_scale
        self.batches = network.batches(tiling.inside(slab))
        self.latents = network.keep_latents(self.batches)

    def __call__(self, x_noisy: Canvas, sigma: float) -> Canvas:
        """The clean clips, in [-1, 1], that the noisy ones stand for (MultiDiffusion average)."""
        average = torch.zeros_like(x_noisy)
        answers = self.network.denoise(
            x_noisy, sigma, self.guidance_scale, tiling=self.tiling, origin=self.slab,
            batches=self.batches, latents=self.latents,
        )  # fmt: skip
        for batch, tiles in answers:
            for clip, number, tile in zip(batch.clips, batch.tiles, tiles, strict=True):
                offset = self.tiling.offsets[number].tolist()
                offset[self.slab.axis] -= self.slab.low
                share = self.tiling.share(number).to(tile.device)
                cut_tile(average[clip], offset, self.tiling.patch).addcmul_(tile, share)
            self.progress(len(batch.tiles))
        return average.clamp_(-1, 1)


def read_level(network: LevelNetwork, tiling: Tiling, x: Canvas) -> FeatureVolumes:
    """Inputs of the blocks that finer levels look at, over the whole of a finished level; tiles
    that overlap are averaged."""
    model, level = network.model, network.level
    blocks, token_size = model.context_blocks(level), model.config.token_size
    volumes: FeatureVolumes = {}
    rows, shape = network.branches * network.clips, model.grid.level_shape(level)
    deep = model.config.fusion == "deep"
    dim = model.config.token_dim if deep else model.token_pixels
    for block in blocks:
        volumes[block, level] = network.store.keep(
            (rows, *shape, dim), network.room.dtype, network.room.volumes
        )
    for batch, block, tokens in network.read(x, tiling, blocks):
        for row, (clip, number) in enumerate(zip(batch.clips, batch.tiles, strict=True)):
            share = tiling.share(number, token_size)[..., None].to(tokens.device)
            corner = [
                o // t for o, t in zip(tiling.offsets[number].tolist(), token_size, strict=True)
            ]
            for branch in range(network.branches):
                place = branch * network.clips + clip
                volumes[block, level].add(
                    (slice(place, place + 1), *_box(corner, model.grid.shape)),
                    (tokens[branch, row].unflatten(0, model.grid.shape) * share)[None],
                )
    network.store.settle()
    return volumes


def joined(conditions: list[Condition]) -> Condition:
    """The rows of several conditions, one after the other."""
    names = [name for name, value in vars(conditions[0]).items() if value is not None]
    return replace(
        conditions[0],
        **{name: torch.cat([getattr(c, name) for c in conditions]) for name in names},
    )


def _box(corner: list[int], shape: tuple[int, int, int]) -> tuple[slice, slice, slice]:
    t, h, w = (slice(low, low + side) for low, side in zip(corner, shape, strict=True))
    return t, h, w
