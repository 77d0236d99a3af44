"""What a recipe says of its data: where samples come from, and what they are conditioned on."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_pipeline.strict import Share, Size, Strict


class Source(Strict):
    """One dataset of the mixture."""

    path: str = Field(description="dataset folder: a local path or s3://bucket/prefix")
    weight: int = Field(default=1, ge=1, description="share of the batch, relative to the others")


class DataConfig(Strict):
    """Where samples come from and how patiently they are read."""

    sources: list[Source] = Field(min_length=1)
    num_workers: int = Field(
        default=4, ge=0, le=512, description="decoding processes per rank; 0: none"
    )
    prefetch_batches: int = Field(
        default=2, ge=1, le=512, description="micro-batches ahead, per worker"
    )
    block_shards: int = Field(
        default=64, ge=1, description="shards that are shuffled together and so in use at a time"
    )
    held_out_share: Share = Field(
        default=0.0, description="share of the samples, at the end of each shard, never trained on"
    )
    max_drop_rate: Share = Field(
        default=0.001, description="share of samples that may be replaced before the run stops"
    )
    max_drops_in_a_row: int = Field(default=100, ge=1)
    decode_deadline_seconds: float = Field(default=30.0, gt=0)


class TextConditioning(Strict):
    """Cached text-encoder embeddings of the captions."""

    kind: Literal["text"]
    encoder: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the embedding set: dataset/embeddings/<encoder>",
    )
    width: int = Field(ge=1, description="channels of an embedding token (T5-11B: 1024)")
    max_tokens: int = Field(ge=1, description="longer captions are cut to this many tokens")
    dropout: Share = Field(default=0.1, description="share of captions replaced by the empty one")
    num_classes: ClassVar[None] = None


class ClassConditioning(Strict):
    """Integer labels, `label` in a sample's metadata; `num_classes` itself is the null class."""

    kind: Literal["class"]
    num_classes: int = Field(ge=1)
    dropout: Share = Field(default=0.1, description="share of labels replaced by the null class")


class NoConditioning(Strict):
    """Unconditional generation."""

    kind: Literal["none"]
    dropout: ClassVar[float] = 0.0
    num_classes: ClassVar[None] = None


Conditioning = Annotated[
    TextConditioning | ClassConditioning | NoConditioning, Field(discriminator="kind")
]


class CachedLatents(Strict):
    """Cached latents of an autoencoder, which a batch holds instead of pixels."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the set: dataset/latents/<name>",
    )
    channels: int = Field(ge=1, description="channels of a latent pixel")
    stride: Size = Field(
        description="pixels per latent: frames after the first, which stands alone, height, width"
    )

    def size(self, clip_size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of the latents of a clip."""
        (frames, height, width), (by_frames, by_height, by_width) = clip_size, self.stride
        return 1 + (frames - 1) // by_frames, height // by_height, width // by_width


def text_shape(conditioning: Conditioning) -> tuple[int, int] | None:
    """(max_tokens, width) of text embeddings, if the recipe has any."""
    if isinstance(conditioning, TextConditioning):
        return conditioning.max_tokens, conditioning.width
    return None
