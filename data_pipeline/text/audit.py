"""Before and after embedding: what it takes, and whether the cache is what the encoder says."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.tar import stored_size
from data_pipeline.text.embeddings import open_embeddings, pack
from data_pipeline.text.encoder import TextEncoder

TOLERANCE = 0.02  # relative to the norm: another device sums bfloat16 in another order


@dataclass(frozen=True)
class Estimate:
    """What embedding a dataset takes, for one process."""

    captions: int
    distinct: int
    parameters: int
    tokens_per_caption: float
    bytes: int
    hours: float

    def __str__(self) -> str:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process"
        return (
            f"{self.captions} captions ({self.distinct} distinct) of {self.tokens_per_caption:.1f} "
            f"tokens, encoder of {self.parameters / 1e6:,.1f} M parameters: "
            f"{self.bytes / 1e9:,.3f} GB, {self.hours:,.3f} hours on one {device}."
        )


def estimate(
    dataset: str | Path, reader: TextEncoder, *, count: int = 128, seed: int = 0
) -> Estimate:
    """Bytes and hours, measured on random captions of a dataset."""
    data = open_dataset(dataset)
    told = [data.read_told(*place)[1] for place in data.draw(count, seed=seed)]
    drawn = [text for captions in told for text in captions.texts]
    reader.encode(drawn[:1])
    started = time.monotonic()
    embeddings = reader.encode(drawn)
    seconds = (time.monotonic() - started) / len(set(drawn))
    known = dict(zip(drawn, embeddings, strict=True))
    stored = sum(
        stored_size([len(pack([known[t] for t in c.texts], c.weights)), len(c.origin.encode())])
        for c in told
    )
    digests = [np.unique(data.index(shard)["caption"]) for shard in range(len(data.info.shards))]
    distinct = len(np.unique(np.concatenate(digests)))
    return Estimate(
        captions=data.info.samples,
        distinct=distinct,
        parameters=sum(weight.numel() for weight in reader.model.parameters()),
        tokens_per_caption=sum(map(len, embeddings)) / len(drawn),
        bytes=round(stored / len(told) * data.info.samples),
        hours=seconds * distinct * len(drawn) / len(told) / 3600,
    )


def check(dataset: str | Path, reader: TextEncoder, *, name: str, count: int, seed: int = 0) -> int:
    """How many random captions were encoded again and found as cached; DataError at another."""
    data = open_dataset(dataset)
    cached = open_embeddings(data, name)
    theirs, ours = cached.info.provenance, reader.provenance
    if not theirs.same_encoder(ours) or theirs.max_tokens != ours.max_tokens:
        raise ConfigError(
            f"{cached.folder}: was made with encoder {theirs.encoder} at max_tokens "
            f"{theirs.max_tokens}, not with {ours.encoder} at {ours.max_tokens}; give that."
        )
    places = data.draw(count, seed=seed)
    asked = [(*place, text) for place in places for text in data.read_told(*place)[1].texts]
    found_of = {place: iter(cached.read_all(*place)[0]) for place in places}
    again = reader.encode([text for *_, text in asked])
    for (shard, row, _), expected in zip(asked, again, strict=True):
        found, expected = next(found_of[shard, row]).float(), expected.float()
        difference = float("inf")
        if found.shape == expected.shape:
            difference = float((found - expected).norm() / expected.norm())
        if not difference <= TOLERANCE:
            raise DataError(
                f"{cached.folder}/{cached.info.shards[shard].name}.tar: row {row} is wrong because "
                f"it differs by {difference:.3g} from what the encoder says; delete the folder and "
                "embed again."
            )
    return len(places)
