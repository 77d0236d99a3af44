"""Latents as `t2v data encode` writes them, of no autoencoder: noise, by shard and row."""

from pathlib import Path

import torch

from data_pipeline.latents.latents import (
    LATENTS,
    LatentSet,
    Normalisation,
    Provenance,
    Statistics,
    Told,
    open_latents,
    origin,
    pack_row,
)
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.derived import begin, claim, fill
from data_pipeline.shards.tar import digest64, list_captions

UNIT = Statistics(mean=[0.0] * 3, std=[1.0] * 3)
MADE = Provenance(
    autoencoder="noise",
    class_name="None",
    weights_sha256="w",
    config_sha256="c",
    normalisation=Normalisation(first=UNIT, later=UNIT),
    channels=3,
    factors=(4, 4, 8),
    clip=(8, 24, 32),
    tile=None,
    posterior="mode",
    dtype="bfloat16",
    compute_dtype="float32",
)


def noise(made: Provenance, shard: int, row: int) -> torch.Tensor:
    """The latents of a sample."""
    generator = torch.Generator().manual_seed(1000 * shard + row)
    return torch.randn(made.size, generator=generator).to(torch.bfloat16)


def write_latents(
    path: Path, *, name: str = "noise", made: list[tuple[int, int]] | None = None, **changes: object
) -> LatentSet:
    """Fill a set, or what is missing of it; `made` is told of the rows that were."""
    data = open_dataset(path)
    clip = MADE.clip if data.info.kind == "video" else (1, *MADE.clip[1:])
    provenance = MADE.model_copy(update={"clip": clip} | changes)
    folder = begin(LATENTS, data, name, (0, 1))
    claim(LATENTS, folder, provenance)

    def rows(shard, former):
        listed = list_captions(f"{data.shard_folder}/{shard:06d}.tar", data.info.kind)
        for row, ((key, _), sample) in enumerate(zip(listed, data.index(shard), strict=True)):
            made_of = origin(sample["media"])
            if known := former.read(digest64(made_of)):
                members = {"safetensors": known["media"], "json": known["json"]}
            else:
                if made is not None:
                    made.append((shard, row))
                fps = 8.0 if data.info.kind == "video" else 0.0
                told = Told(fps=fps, original_height=32, original_width=48)
                members = pack_row(noise(provenance, shard, row), told)
            yield key, members | {"txt": made_of.encode()}

    assert fill(LATENTS, data, folder, provenance, task=(0, 1), rows=rows)
    return open_latents(data, name)
