"""Reading cached caption embeddings, and the proof that they belong to a dataset."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import BFloat16
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards.dataset import (
    Dataset,
    ShardInfo,
    cached_index,
    parse_manifest,
    read_manifest,
)
from data_pipeline.shards.tar import read_member
from data_pipeline.store import storage
from data_pipeline.strict import Strict

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
NULL = "null.safetensors"
TENSOR = "tokens"

Embedding = BFloat16[Tensor, "tokens width"]


class Provenance(Strict):
    """What an embedding is a function of, besides its caption."""

    encoder: str = Field(description="hub id, or name of the local folder")
    weights_sha256: str
    tokenizer_sha256: str
    max_tokens: int = Field(ge=1, description="longer captions are cut, end mark included")
    width: int = Field(ge=1)
    dtype: Literal["bfloat16"]
    compute_dtype: Literal["float32", "bfloat16"]
    caption_normalisation: Literal["single spaces"]

    def same_encoder(self, other: "Provenance") -> bool:
        """Whether weights and tokenizer are the same, whatever their folder is called."""
        mine = self.weights_sha256, self.tokenizer_sha256
        return mine == (other.weights_sha256, other.tokenizer_sha256)


class EmbeddingInfo(Strict):
    """What an embedding set's `manifest.json` says."""

    format: Literal[1]
    fingerprint: str = Field(description="digest of provenance, dataset and every shard's index")
    provenance: Provenance
    dataset_fingerprint: str
    shards: list[ShardInfo]


@dataclass(frozen=True)
class EmbeddingSet:
    """Cached embeddings of a dataset, by (shard, row)."""

    folder: str
    info: EmbeddingInfo
    dataset: Dataset

    @property
    def null(self) -> Embedding:
        """The embedding of the empty caption."""
        return _read_null(storage.join(self.folder, NULL), self.info.provenance.width)

    def read(self, shard: int, row: int) -> Embedding:
        """The embedding of a sample's caption."""
        name = self.info.shards[shard].name
        path = storage.join(self.folder, f"{name}.tar")
        entry, sample = cached_index(self.folder, name)[row], self.dataset.index(shard)[row]
        if entry["key"] != sample["key"] or entry["caption"] != sample["caption"]:
            raise DataError(f"{path}: row {row} is of another sample or caption")
        return parse_embedding(read_member(path, entry["media"]), path, self.info.provenance.width)


def open_embeddings(dataset: Dataset, name: str) -> EmbeddingSet:
    """The embedding set of a name; refuses one made for other data."""
    folder = storage.join(dataset.path, "embeddings", name)
    path = storage.join(folder, MANIFEST)
    remedy = f"`t2v data embed {dataset.path} --encoder ENCODER --name {name}`"
    content = read_manifest(path, f"{dataset.path}: has no embeddings '{name}'", remedy)
    info = parse_manifest(EmbeddingInfo, content, path)
    if info.dataset_fingerprint != dataset.info.fingerprint:
        raise ConfigError(
            f"{path}: dataset_fingerprint: value {info.dataset_fingerprint[:12]} is wrong because "
            f"the dataset's is {dataset.info.fingerprint[:12]}; embed this dataset again: {remedy}."
        )
    ours = [(shard.name, shard.samples) for shard in info.shards]
    if ours != [(shard.name, shard.samples) for shard in dataset.info.shards]:
        raise DataError(f"{path}: shards differ from the dataset's; embed again: {remedy}.")
    path = storage.join(folder, NULL)
    parse_embedding(storage.read_bytes(path), path, info.provenance.width)
    return EmbeddingSet(folder, info, dataset)


@lru_cache(maxsize=64)
def _read_null(path: str, width: int) -> Embedding:
    return parse_embedding(storage.read_bytes(path), path, width)


def parse_embedding(content: bytes, path: str, width: int) -> Embedding:
    """The tensor in a safetensors file."""
    try:
        tensor = load(content)[TENSOR]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: an embedding is damaged ({error})") from None
    if tensor.dtype != torch.bfloat16 or tensor.ndim != 2 or tensor.shape[1] != width:
        raise DataError(f"{path}: an embedding is {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor
