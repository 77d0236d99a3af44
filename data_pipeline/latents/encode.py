"""Making latents: what an autoencoder makes of clips and images, cached beside a dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.latents.autoencoder import Autoencoder, LatentClips, Pixels, pixels_of
from data_pipeline.latents.latents import (
    LATENTS,
    LatentSet,
    Normalisation,
    Provenance,
    Told,
    open_latents,
    origin,
    pack_row,
)
from data_pipeline.latents.tiles import refuse_misfit, tile_within
from data_pipeline.media.codec import reduction
from data_pipeline.pyramid import Pyramid
from data_pipeline.shards.dataset import Dataset, open_dataset
from data_pipeline.shards.derived import Former, Row, begin, claim, fill
from data_pipeline.shards.pixels import read_patches
from data_pipeline.shards.tar import digest64, list_captions
from data_pipeline.store import storage
from data_pipeline.strict import Size


@dataclass(frozen=True)
class Encoding:
    """A dataset, and how its clips are encoded."""

    data: Dataset
    reader: Autoencoder
    clip: Size
    tile: int | None

    @property
    def provenance(self) -> Provenance:
        """What the latents are a function of."""
        return self.reader.provenance(self.clip, self.tile)

    def pixels(self, shard: int, row: int) -> tuple[Pixels, Told]:
        """A sample as it is encoded, and what stands beside its latents."""
        whole = Pyramid(levels=1, patch_size=self.clip, clip_size=self.clip)
        try:
            record = self.data.read(shard, row)
            start = np.zeros((1, 3), np.int64)
            (clip,), fps, size = read_patches(self.data, record, whole, start)
        except DataError as error:
            name = self.data.info.shards[shard].name
            raise DataError(
                f"{self.data.path}: row {row} of shard {name} cannot be encoded ({error}); run "
                f"`t2v data verify {self.data.path} --repair`."
            ) from None
        told = Told(fps=fps, original_height=size[0], original_width=size[1])
        return pixels_of(clip), told

    def latents(self, pixels: Pixels) -> LatentClips:
        """The normalised latents of a sample."""
        return self.reader.encode(pixels, tile=self.tile)


def begin_encoding(
    dataset: Dataset,
    vae: str | Path,
    *,
    size: Size | None = None,
    normalisation: Normalisation | None = None,
    device: str | None = None,
    memory_gib: float | None = None,
) -> Encoding:
    """An autoencoder for a dataset, by default of its clips as they are stored, each as a whole;
    `memory_gib` may demand tiles. ConfigError where clips do not fit the autoencoder."""
    clip = _clip_size(dataset, size)
    reader = Autoencoder(vae, normalisation=normalisation, device=device)
    refuse_misfit(reader, clip, dataset.path)
    tile = None if memory_gib is None else tile_within(reader, memory_gib * 2**30, clip)
    return Encoding(dataset, reader, clip, tile)


def encode(
    dataset: str | Path,
    vae: str | Path,
    *,
    name: str,
    size: Size | None = None,
    normalisation: Normalisation | None = None,
    task: tuple[int, int] = (0, 1),
    device: str | None = None,
    memory_gib: float | None = None,
) -> LatentSet | None:
    """Write `latents/<name>` of a dataset; the set is returned once every shard is there.

    Shards already encoded in the same way are kept, so it can be killed and started again, and
    tasks (number, count) may run side by side. Of shards that changed, only clips that are new are
    encoded.
    """
    data = open_dataset(dataset)
    folder = begin(LATENTS, data, name, task)
    encoding = begin_encoding(
        data, vae, size=size, normalisation=normalisation, device=device, memory_gib=memory_gib
    )
    claim(LATENTS, folder, encoding.provenance)

    def rows(shard: int, former: Former) -> Iterator[Row]:
        tar = storage.join(data.shard_folder, f"{data.info.shards[shard].name}.tar")
        keys = [key for key, _ in list_captions(tar, data.info.kind)]
        for row, (key, sample) in enumerate(zip(keys, data.index(shard), strict=True)):
            made_of = origin(sample["media"])
            if known := former.read(digest64(made_of)):
                members = {"safetensors": known["media"], "json": known["json"]}
            else:
                pixels, told = encoding.pixels(shard, row)
                members = pack_row(encoding.latents(pixels)[0].to(torch.bfloat16), told)
            yield key, members | {"txt": made_of.encode()}

    done = fill(LATENTS, data, folder, encoding.provenance, task=task, rows=rows)
    return open_latents(data, name) if done else None


def read_normalisation(path: str | Path) -> Normalisation:
    """A normalisation from a file of JSON."""
    if not Path(path).is_file():
        raise InputMissing(f"{path}: no such file; write one with --measure {path}.")
    try:
        return Normalisation.model_validate_json(Path(path).read_bytes())
    except ValueError:
        raise ConfigError(f"{path}: is no normalisation; write one with --measure.") from None


def _clip_size(data: Dataset, size: Size | None) -> Size:
    """The pixels that clips are encoded at; of an image, one frame."""
    wanted = size or data.info.clip
    if wanted is None:
        raise ConfigError(
            f"--size: missing because the clips of {data.path} are of any size; give FxHxW."
        )
    clip = (1, *wanted[1:]) if data.info.kind == "image" else wanted
    if data.info.clip:
        try:
            reduction(data.info.clip, clip, data.info.kind)
        except ConfigError as error:
            raise ConfigError(f"{data.path}: {error}") from None
    return clip
