"""Reading cached caption embeddings, and the proof that they belong to a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import BFloat16
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.derived import DerivedInfo, Kind, Members, open_info, read_row
from data_pipeline.store import storage
from data_pipeline.strict import Strict

NULL = "null.safetensors"
TENSOR = "tokens"

Embedding = BFloat16[Tensor, "tokens width"]
ComputeDtype = Literal["float32", "bfloat16", "declared"]  # declared: others computed it


class Provenance(Strict):
    """What an embedding is a function of, besides its caption."""

    encoder: str = Field(description="hub id, or name of the local folder")
    weights_sha256: str
    tokenizer_sha256: str
    layer: int | None = Field(None, ge=0, description="hidden layer; none: the last output")
    max_tokens: int = Field(ge=1, description="longer captions are cut, end mark included")
    width: int = Field(ge=1)
    dtype: Literal["bfloat16"]
    compute_dtype: ComputeDtype
    caption_normalisation: Literal["single spaces"]

    def same_encoder(self, other: "Provenance") -> bool:
        """Whether weights, tokenizer and layer are the same, whatever their folder is called."""
        mine = self.weights_sha256, self.tokenizer_sha256, self.layer
        return mine == (other.weights_sha256, other.tokenizer_sha256, other.layer)


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

    def read(self, shard: int, row: int, chance: float = 0.0) -> Embedding:
        """The embedding of a sample's caption; of one of several, by their weights, where a chance
        from 0 to 1 falls."""
        embeddings, weights = self.read_all(shard, row)
        below = np.cumsum(weights) <= chance
        return embeddings[min(int(below.sum()), len(embeddings) - 1)]

    def read_all(self, shard: int, row: int) -> tuple[list[Embedding], list[float]]:
        """The embeddings of all captions of a sample, and how often each is to be taken."""
        path, members = read_row(EMBEDDINGS, self.folder, self.dataset, shard, row)
        return unpack(members["media"], path, self.info.provenance.width)


def open_embeddings(dataset: Dataset, name: str) -> EmbeddingSet:
    """The embedding set of a name; refuses one made for other data."""
    folder, info = open_info(EMBEDDINGS, dataset, name)
    path = storage.join(folder, NULL)
    unpack(storage.read_bytes(path), path, info.provenance.width)
    return EmbeddingSet(folder, info, dataset)


@lru_cache(maxsize=64)
def _read_null(path: str, width: int) -> Embedding:
    return unpack(storage.read_bytes(path), path, width)[0][0]


def pack(embeddings: Sequence[Embedding], weights: Sequence[float]) -> bytes:
    """A safetensors file of the embeddings of a sample's captions: `tokens`, and where there are
    several `tokens.1`, ... and `weights`."""
    tensors = {_tensor(number): tokens for number, tokens in enumerate(embeddings)}
    if len(embeddings) > 1:
        tensors["weights"] = torch.tensor(weights, dtype=torch.float32)
    return save(tensors)


def unpack(content: bytes, path: str, width: int) -> tuple[list[Embedding], list[float]]:
    """The embeddings and weights in a file that `pack` made."""
    try:
        tensors = load(content)
        weights = tensors.pop("weights").tolist() if "weights" in tensors else [1.0]
        embeddings = [tensors[_tensor(number)] for number in range(len(weights))]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: an embedding is damaged ({error})") from None
    for tensor in embeddings:
        if tensor.dtype != torch.bfloat16 or tensor.ndim != 2 or tensor.shape[1] != width:
            raise DataError(
                f"{path}: an embedding is {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    return embeddings, weights


def _tensor(number: int) -> str:
    return f"{TENSOR}.{number}" if number else TENSOR


def _check(members: Members, path: str, provenance: Provenance) -> None:
    for tokens in unpack(members["media"], path, provenance.width)[0]:
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
