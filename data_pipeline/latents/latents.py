"""Reading cached latents, and the proof that they belong to a dataset and an autoencoder."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import BFloat16
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.derived import DerivedInfo, Kind, Members, open_info, read_row
from data_pipeline.shards.tar import digest64
from data_pipeline.strict import Size, Strict

TENSOR = "latents"

Latents = BFloat16[Tensor, "channels latent_frames latent_height latent_width"]


class Statistics(Strict):
    """Mean and standard deviation of latents, per channel."""

    mean: list[float]
    std: list[float]


class Normalisation(Strict):
    """What latents are shifted and scaled by: the first frame of a clip, which a causal autoencoder
    encodes as an image, and the later ones."""

    first: Statistics
    later: Statistics


class Provenance(Strict):
    """What latents are a function of, besides the clip."""

    autoencoder: str = Field(description="hub id, or name of the local folder")
    class_name: str = Field(description="of diffusers")
    weights_sha256: str
    config_sha256: str
    normalisation: Normalisation
    channels: int = Field(ge=1)
    factors: Size = Field(description="pixels per latent: frames after the first, height, width")
    clip: Size = Field(description="pixels of the clips, of which latents keep the first frame")
    tile: int | None = Field(ge=1, description="pixels a side that are encoded at a time")
    posterior: Literal["mode"]
    dtype: Literal["bfloat16"]
    compute_dtype: Literal["float32"]

    def same_autoencoder(self, other: "Provenance") -> bool:
        """Whether latents of both mean the same, whatever the autoencoder's folder is called."""
        mine = self.class_name, self.weights_sha256, self.config_sha256, self.normalisation
        return mine == (
            *(other.class_name, other.weights_sha256, other.config_sha256),
            other.normalisation,
        )

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of a clip's latents."""
        (frames, height, width), (by_t, by_h, by_w) = self.clip, self.factors
        return self.channels, 1 + (frames - 1) // by_t, height // by_h, width // by_w


class Told(Strict):
    """What of a sample stands beside its latents; an image has 0 fps."""

    fps: float = Field(ge=0)
    original_height: float = Field(ge=0)
    original_width: float = Field(ge=0)


class LatentInfo(DerivedInfo[Provenance]):
    """What a latent set's `manifest.json` says."""


@dataclass(frozen=True)
class LatentSet:
    """Cached latents of a dataset, by (shard, row)."""

    folder: str
    info: DerivedInfo[Provenance]
    dataset: Dataset

    def read(self, shard: int, row: int) -> tuple[Latents, Told]:
        """A sample's normalised latents, and its frame rate and original size."""
        path, members = read_row(LATENTS, self.folder, self.dataset, shard, row)
        return parse_row(members, path, self.info.provenance)


def open_latents(dataset: Dataset, name: str) -> LatentSet:
    """The latents of a name; refuses those made for other data."""
    return LatentSet(*open_info(LATENTS, dataset, name), dataset)


def pack_row(latents: Latents, told: Told) -> dict[str, bytes]:
    """What is stored of a sample, by suffix, but for its origin."""
    return {"safetensors": save({TENSOR: latents}), "json": told.model_dump_json().encode()}


def parse_row(members: Members, path: str, provenance: Provenance) -> tuple[Latents, Told]:
    """What `pack_row` packed."""
    try:
        latents = load(members["media"])[TENSOR]
        told = Told.model_validate_json(members["json"])
    except (SafetensorError, ValidationError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: latents are damaged ({reason})") from None
    if latents.dtype != torch.bfloat16 or latents.shape != provenance.size:
        raise DataError(f"{path}: latents are {latents.dtype} of shape {tuple(latents.shape)}")
    return latents, told


def origin(media: np.void) -> str:
    """What names the bytes that latents are made of: checksum and size of a sample's media."""
    return f"{int(media['crc32']):08x}-{int(media['size'])}"


def _origins(rows: np.ndarray) -> np.ndarray:
    return np.array([digest64(origin(row["media"])) for row in rows], np.uint64)


def _check(members: Members, path: str, provenance: Provenance) -> None:
    latents, _ = parse_row(members, path, provenance)
    if not torch.isfinite(latents).all():
        raise DataError("holds values that are not finite")


LATENTS = Kind(
    folder="latents",
    verb="encode",
    maker="autoencoder",
    option="--vae AUTOENCODER",
    origin="clip",
    info=LatentInfo,
    origins=_origins,
    check=_check,
    tell=lambda made: f"{'x'.join(map(str, made.size))}, by {made.autoencoder}",
)
