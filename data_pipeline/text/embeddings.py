"""Reading cached caption embeddings, and the proof that they belong to a dataset."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import BFloat16
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.derived import DerivedInfo, Kind, Members, open_info, read_row
from data_pipeline.store import storage
from data_pipeline.strict import Strict

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


class EmbeddingInfo(DerivedInfo[Provenance]):
    """What an embedding set's `manifest.json` says."""


@dataclass(frozen=True)
class EmbeddingSet:
    """Cached embeddings of a dataset, by (shard, row)."""

    folder: str
    info: DerivedInfo[Provenance]
    dataset: Dataset

    @property
    def null(self) -> Embedding:
        """The embedding of the empty caption."""
        return _read_null(storage.join(self.folder, NULL), self.info.provenance.width)

    def read(self, shard: int, row: int) -> Embedding:
        """The embedding of a sample's caption."""
        path, members = read_row(EMBEDDINGS, self.folder, self.dataset, shard, row)
        return parse_embedding(members["media"], path, self.info.provenance.width)


def open_embeddings(dataset: Dataset, name: str) -> EmbeddingSet:
    """The embedding set of a name; refuses one made for other data."""
    folder, info = open_info(EMBEDDINGS, dataset, name)
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


def _check(members: Members, path: str, provenance: Provenance) -> None:
    tokens = parse_embedding(members["media"], path, provenance.width)
    if not 1 <= len(tokens) <= provenance.max_tokens:
        raise DataError(f"has {len(tokens)} tokens, not 1 to {provenance.max_tokens}")
    if not torch.isfinite(tokens).all():
        raise DataError("holds values that are not finite")


def _captions(rows: np.ndarray) -> np.ndarray:
    return rows["caption"]


EMBEDDINGS = Kind(
    folder="embeddings",
    verb="embed",
    maker="encoder",
    option="--encoder ENCODER",
    origin="caption",
    info=EmbeddingInfo,
    origins=_captions,
    check=_check,
    tell=lambda made: f"width {made.width}, by {made.encoder}",
)
