"""Batches of patches, text embeddings and metadata, in an order no failure disturbs."""

from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.strict import Share, Strict


class Source(Strict):
    """One dataset of the mixture."""

    path: str = Field(description="dataset folder: a local path or s3://bucket/prefix")
    weight: int = Field(default=1, ge=1, description="share of the batch, relative to the others")


class DataConfig(Strict):
    """Where samples come from and how patiently they are read."""

    sources: list[Source] = Field(min_length=1)
    num_workers: int = Field(default=4, ge=0, description="decoding processes per rank; 0: none")
    prefetch_batches: int = Field(default=2, ge=1, description="micro-batches ahead, per worker")
    max_drop_rate: Share = Field(
        default=0.001, description="share of samples that may be replaced before the run stops"
    )
    max_drops_in_a_row: int = Field(default=100, ge=1)
    decode_deadline_seconds: float = Field(default=30.0, gt=0)


class TextConditioning(Strict):
    """Cached text-encoder embeddings of the captions."""

    kind: Literal["text"]
    encoder: str = Field(description="name of the embedding set: dataset/embeddings/<encoder>")
    width: int = Field(ge=1, description="channels of an embedding token (T5-11B: 1024)")
    max_tokens: int = Field(ge=1, description="longer captions are cut to this many tokens")
    dropout: Share = Field(default=0.1, description="share of captions replaced by the empty one")


class ClassConditioning(Strict):
    """Integer labels, `label` in a sample's metadata; `num_classes` itself is the null class."""

    kind: Literal["class"]
    num_classes: int = Field(ge=1)
    dropout: Share = Field(default=0.1, description="share of labels replaced by the null class")


class NoConditioning(Strict):
    """Unconditional generation."""

    kind: Literal["none"]


Conditioning = Annotated[
    TextConditioning | ClassConditioning | NoConditioning, Field(discriminator="kind")
]
