"""What sampling keeps where, so that it stays within a memory budget; no choice moves a result by
more than rounding."""

from dataclasses import dataclass
from math import prod

import torch

from data_pipeline.errors import ConfigError
from t2v.methods.hpdm.network import HPDM, PIXELS
from t2v.methods.hpdm.settings import HPDMSamplingConfig, level_tilings
from t2v.methods.hpdm.store import Where
from t2v.methods.hpdm.tiling import Slab, Tiling
from t2v.methods.method import Room, no_room

CANVASES = 4  # of the level at hand: noisy, average, stepped, and what the allocator holds
KEPT_CANVASES = {"euler": 0, "heun": 0, "dpm++": 2, "unipc": 4}  # of the steps before
FP32 = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LevelRoom:
    """How a level is computed within the budget.

    `volumes` says where its features are kept once it is finished, `latents` where those of its
    tiles are kept between steps; its slabs are sampled one after the other.
    """

    tile_batch: int
    slabs: tuple[Slab, ...]
    volumes: Where = "device"
    latents: Where = "device"
    dtype: torch.dtype = torch.float32


@dataclass
class Free:
    """Bytes left: of the device at each level, and of main memory beside it."""

    device: list[int]
    host: int

    def place(self, needed: dict[int, int]) -> Where:
        """Where an array goes that takes `needed[level]` bytes at each level it lives through."""
        if all(size <= self.device[level] for level, size in needed.items()):
            for level, size in needed.items():
                self.device[level] -= size
            return "device"
        most = max(needed.values())
        if most <= self.host:
            self.host -= most
            return "host"
        return "disk"


def plan_memory(
    model: HPDM,
    sampling: HPDMSamplingConfig,
    *,
    clips: int,
    device_bytes: int,
    host_bytes: int = 0,
    team_size: int = 1,
) -> list[LevelRoom]:
    """The room of each level; ConfigError where not even one tile fits.

    A tile batch gets half of what the canvases leave, then come features of finished levels, then
    latents. Where all latents do not fit, slabs that share no tile take turns; where one slab's
    do not, they are kept outside the device.
    """
    levels = range(model.pyramid.levels)
    dtype = DTYPES[sampling.keep]
    batches: list[int] = []
    free = Free([], host_bytes)
    for level in levels:
        canvases = CANVASES + KEPT_CANVASES[sampling.level_solver(level)]
        spare = device_bytes - canvases * clips * canvas_bytes(model, level)
        branches = len(sampling.branches(level))
        row = row_bytes(model, level, max(latents_of(model, sampling, level)))
        if spare < 2 * branches * row:
            raise no_room(device_bytes, 2 * branches * row - spare, f"level {level}")
        batches.append(min(sampling.tile_batch, int(spare / 2 / row)))
        free.device.append(spare - max(batches[-1], branches) * row)
    volumes: list[Where] = [
        free.place(
            {
                level: clips * len(sampling.readers(coarse)) * volume_bytes(
                    model, coarse, level, dtype.itemsize
                )
                for level in levels[coarse:]
            }
        )
        for coarse in levels[:-1]
    ]  # fmt: skip
    rooms = []
    for level in levels:
        tilings = level_tilings(sampling, model.pyramid, level)
        slabs = (Slab(0, 0, tilings[0].size[0]),)
        tile_bytes = 0
        if model.self_conditioning is not None:
            latents = sum(latents_of(model, sampling, level))
            tile_bytes = clips * latents * model.config.latent_dim * dtype.itemsize
        if tile_bytes and len(tilings) == 1:
            most = free.device[level] * team_size // tile_bytes
            cut = tilings[0].slabs(most)
            if most_tiles(tilings[0], cut) <= most:
                slabs = tuple(cut)
        tiles = sum(most_tiles(tiling, slabs) for tiling in tilings)
        # A member of a team keeps its own batches, of which one may be short.
        mine = -(-tiles // team_size) + (batches[level] if team_size > 1 else 0)
        where = free.place({level: mine * tile_bytes})
        after = volumes[level] if level < len(volumes) else "device"
        rooms.append(LevelRoom(batches[level], slabs, after, where, dtype))
    return rooms


def clips_that_fit(
    model: HPDM, sampling: HPDMSamplingConfig, most: int, room: Room, *, team_size: int
) -> int:
    """How many clips go together: as many as fit without a smaller tile batch or a place outside
    the device, or one; ConfigError where not one fits."""
    for many in range(most, 0, -1):
        try:
            rooms = plan_memory(
                model,
                sampling,
                clips=many,
                device_bytes=room.device_bytes,
                host_bytes=room.host_bytes,
                team_size=team_size,
            )
        except ConfigError:
            if many == 1:
                raise
            continue
        if many == 1 or all(
            level.tile_batch == sampling.tile_batch and {level.volumes, level.latents} == {"device"}
            for level in rooms
        ):
            return many
    raise AssertionError("one clip is the least")


def canvas_bytes(model: HPDM, level: int) -> int:
    """Of one clip's pixels at a level."""
    return 3 * prod(model.pyramid.size(level)) * FP32


def volume_bytes(model: HPDM, coarse: int, level: int, itemsize: int) -> int:
    """Of one clip's features of a finished level while another is sampled; the finer it is, the
    fewer blocks it runs and the fewer features it reads."""
    blocks = [
        block
        for block in model.config.context_blocks(coarse)
        if coarse == level or level in model.config.fused_levels(block)
    ]
    tokens = prod(model.grid.level_shape(coarse))
    values = len(blocks) * tokens * model.config.feature_dim
    if model.config.coarse_pixels and level <= coarse + 1:
        values += 3 * prod(model.pyramid.size(coarse))
    return values * itemsize


def latents_of(model: HPDM, sampling: HPDMSamplingConfig, level: int) -> list[int]:
    """How many latents each branch of a level has."""
    return [branch.latents or model.config.num_latents for branch in sampling.branches(level)]


def row_bytes(model: HPDM, level: int, num_latents: int) -> int:
    """The most that one tile takes inside a forward pass, estimated from its activations."""
    config, tokens = model.config, model.grid.count
    activations = tokens * (18 * config.token_dim + 2 * config.latent_dim)
    latents = 18 * num_latents * config.latent_dim
    inputs = len(config.context_blocks(level)) * tokens * config.feature_dim
    corner = torch.zeros(1, 3, dtype=torch.long)
    boxes = sum(
        3 * prod(model.pixel_grid.support(level, corner, coarser)[1])
        if block == PIXELS
        else config.feature_dim * prod(model.grid.support(level, corner, coarser)[1])
        for block, coarser in config.context_features(level)
    )
    # Boxes are there three times: in use, fetched for the next batch, and on their way.
    return FP32 * (activations + latents + inputs + 3 * boxes)


def most_tiles(tiling: Tiling, slabs: list[Slab] | tuple[Slab, ...]) -> int:
    """Of the largest slab."""
    return max(len(tiling.inside(slab)) for slab in slabs)
