"""Before and after encoding: what it takes, how latents spread, and whether the cache is true."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.latents.autoencoder import Autoencoder
from data_pipeline.latents.encode import Encoding
from data_pipeline.latents.latents import Normalisation, Statistics, open_latents, pack_row
from data_pipeline.progress import progress
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.tar import stored_size
from data_pipeline.strict import Size

TOLERANCE = 0.02  # relative to the norm: another device sums in another order, and it is bfloat16


@dataclass(frozen=True)
class Estimate:
    """What encoding a dataset takes, for one process."""

    samples: int
    parameters: int
    clip: Size
    latents: tuple[int, ...]
    bytes: int
    hours: float
    device: str

    def __str__(self) -> str:
        clip, latents = ("x".join(map(str, size)) for size in (self.clip, self.latents))
        return (
            f"{self.samples} clips of {clip} as latents of {latents}, autoencoder of "
            f"{self.parameters / 1e6:,.1f} M parameters: {self.bytes / 1e9:,.3f} GB, "
            f"{self.hours:,.3f} hours on one {self.device}."
        )


@dataclass(frozen=True)
class Fidelity:
    """How clips differ from what the autoencoder makes of their latents: in decibels of the peak
    signal over the error, one number for each clip."""

    decibels: list[float]

    def __str__(self) -> str:
        middle, worst = float(np.median(self.decibels)), min(self.decibels)
        return (
            f"decoded again, clips differ from their pixels by {_levels(middle):.1f} of 255 "
            f"(PSNR {middle:.1f} dB); the worst by {_levels(worst):.1f} ({worst:.1f} dB)."
        )


def estimate(encoding: Encoding, *, count: int = 4, seed: int = 0) -> Estimate:
    """Bytes and hours, measured on random samples of a dataset."""
    data, reader = encoding.data, encoding.reader
    stored, seconds = [], []
    for place in data.draw(count + 1, seed=seed):
        started = time.monotonic()
        pixels, told = encoding.pixels(*place)
        latents = encoding.latents(pixels)[0].to(torch.bfloat16)
        stored.append(stored_size([*map(len, pack_row(latents, told).values()), 1]))
        seconds.append(time.monotonic() - started)
    steady = seconds[1:] or seconds  # the first one loads and tunes
    is_gpu = reader.device.type == "cuda"
    return Estimate(
        samples=data.info.samples,
        parameters=sum(weight.numel() for weight in reader.model.parameters()),
        clip=encoding.clip,
        latents=encoding.provenance.size,
        bytes=round(sum(stored) / len(stored) * data.info.samples),
        hours=sum(steady) / len(steady) * data.info.samples / 3600,
        device=torch.cuda.get_device_name(reader.device) if is_gpu else "CPU process",
    )


def measure(encoding: Encoding, *, count: int = 256, seed: int = 0) -> Normalisation:
    """Means and deviations of the autoencoder's own latents over random samples; later frames of
    images are taken to be as their only one."""
    reader = encoding.reader
    first, later = _Moments(reader.channels), _Moments(reader.channels)
    places = encoding.data.draw(count, seed=seed)
    for place in progress(places, "measure", total=len(places)):
        pixels, _ = encoding.pixels(*place)
        latents = reader.denormalise(encoding.latents(pixels))[0]
        first.add(latents[:, :1])
        later.add(latents[:, 1:])
    one = first.statistics()
    return Normalisation(first=one, later=later.statistics() if later.count else one)


def check(
    dataset: str | Path,
    vae: str | Path,
    *,
    name: str,
    count: int,
    memory_gib: float | None = None,
    seed: int = 0,
) -> Fidelity:
    """Encode random samples again and find them as cached, or DataError; and decode them."""
    data = open_dataset(dataset)
    cached = open_latents(data, name)
    theirs = cached.info.provenance
    reader = Autoencoder(vae, normalisation=theirs.normalisation)
    if not theirs.same_autoencoder(reader.provenance(theirs.clip, theirs.tile)):
        raise ConfigError(
            f"{cached.folder}: was made with autoencoder {theirs.autoencoder}, not with "
            f"{reader.name}; give that."
        )
    encoding, decode_tile = Encoding(data, reader, theirs.clip, theirs.tile), theirs.tile
    if memory_gib is not None:
        decode_tile = reader.tile_within(memory_gib * 2**30, theirs.clip, decoding=True)
    decibels = []
    places = data.draw(count, seed=seed)
    for shard, row in progress(places, "check", total=len(places)):
        pixels, _ = encoding.pixels(shard, row)
        expected, found = encoding.latents(pixels), cached.read(shard, row)[0][None].float()
        difference = float((found - expected).norm() / expected.norm())
        if not difference <= TOLERANCE:
            raise DataError(
                f"{cached.folder}/{cached.info.shards[shard].name}.tar: row {row} is wrong because "
                f"it differs by {difference:.3g} from what the autoencoder says; delete the folder "
                "and encode again."
            )
        error = float((reader.decode(found, tile=decode_tile) - pixels).square().mean())
        decibels.append(10 * math.log10(4 / max(error, 1e-10)))  # pixels span 2
    return Fidelity(decibels)


class _Moments:
    """Sums of latents and of their squares, per channel."""

    def __init__(self, channels: int):
        self.count = 0
        self.sums = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        values = latents.flatten(1).double()
        self.count += values.shape[1]
        self.sums += torch.stack([values.sum(1), values.square().sum(1)])

    def statistics(self) -> Statistics:
        mean, square = self.sums / self.count
        std = (square - mean.square()).clamp(min=0).sqrt()
        return Statistics(mean=mean.tolist(), std=std.tolist())


def _levels(decibels: float) -> float:
    """The root mean square error of a peak signal-to-noise ratio, in levels of 8 bits."""
    return 255 * 10 ** (-decibels / 20)
