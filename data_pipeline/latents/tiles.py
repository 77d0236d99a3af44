"""Which clips an autoencoder takes, and in which tiles a pass stays within a memory budget."""

import math

import torch

from data_pipeline.errors import ConfigError
from data_pipeline.latents.autoencoder import Autoencoder, set_tiles
from data_pipeline.latents.memory import LiveBytes
from data_pipeline.strict import Size

TILES = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 32)
WORKSPACE = 1.5  # of live tensors, for what convolutions copy besides; measured: 1.0 to 1.5


def tile_within(
    autoencoder: Autoencoder, memory_bytes: float, clip: Size, *, decoding: bool = False
) -> int | None:
    """The largest tile, in pixels a side, that a pass takes within a budget that holds the
    weights, too; None: clips fit whole. ConfigError where the smallest does not fit."""
    weights = sum(tensor.nbytes for tensor in autoencoder.model.state_dict().values())
    needed = math.inf
    step = 4 * math.lcm(*autoencoder.factors[1:])  # tiles overlap by a quarter
    sides = [side for side in TILES if side < max(clip[1:]) and not side % step]
    for tile in (None, *sides):
        needed = weights + WORKSPACE * working_bytes(autoencoder, clip, tile, decoding)
        if needed <= memory_bytes:
            return tile
    raise ConfigError(
        f"--memory-gib: {memory_bytes / 2**30:.3g} is wrong because {autoencoder.name} needs "
        f"{needed / 2**30:.3g} GiB for clips of {clip} in its smallest tiles; give more."
    )


def working_bytes(autoencoder: Autoencoder, clip: Size, tile: int | None, decoding: bool) -> float:
    """Peak of a pass's live tensors. Clips in tiles are cut to two tiles a side, and what is
    kept of all tiles is added: a pass over hundreds of them would take minutes to count."""
    frames, *sides = clip
    if tile:
        sides = [min(side, 2 * tile) for side in sides]
    set_tiles(autoencoder.outline, tile)
    with torch.inference_mode(), LiveBytes() as live:
        pixels = torch.empty(1, 3, frames, *sides, device="meta")
        if decoding:
            _, by_h, by_w = autoencoder.factors
            _, latent_frames, *_ = autoencoder.provenance(clip, tile).size
            shape = (1, autoencoder.channels, latent_frames, sides[0] // by_h, sides[1] // by_w)
            del pixels
            autoencoder.outline.decode(torch.empty(shape, device="meta"))
        else:
            autoencoder.outline.encode(pixels)
    copies = 4 if decoding else 1  # of pixels: tiles, rows of them, the whole, and clamped
    left_out = frames * (math.prod(clip[1:]) - math.prod(sides))
    return live.peak + copies * 3 * 4 * left_out


def refuse_misfit(autoencoder: Autoencoder, clip: Size, path: str) -> None:
    """ConfigError, which begins with `path`, where clips of a size do not come back as they
    are; it tells the nearest sizes that would."""
    frames, *sides = clip
    if (frames - 1) % autoencoder.unit_frames:
        low = (frames - 1) // autoencoder.unit_frames * autoencoder.unit_frames + 1
        raise ConfigError(
            f"{path}: clips of {frames} frames are wrong because {autoencoder.name} takes 1 + "
            f"{autoencoder.unit_frames} x k; use {low} or {low + autoencoder.unit_frames}."
        )
    for axis, side, factor in zip(("height", "width"), sides, autoencoder.factors[1:], strict=True):
        if side % factor:
            low = max(side // factor, 1) * factor
            raise ConfigError(
                f"{path}: clips of {axis} {side} are wrong because {autoencoder.name} takes "
                f"multiples of {factor}; use {low} or {low + factor}."
            )
