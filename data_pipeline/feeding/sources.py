"""The datasets of a recipe, opened with what is cached of them, and the proof that all fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import CachedLatents, Conditioning, DataConfig, TextConditioning
from data_pipeline.latents.latents import LatentSet, open_latents
from data_pipeline.latents.latents import Provenance as Autoencoder
from data_pipeline.media.codec import reduction
from data_pipeline.pyramid import Pyramid
from data_pipeline.shards.dataset import Dataset, cached_index, open_dataset
from data_pipeline.text.embeddings import EmbeddingSet, open_embeddings
from data_pipeline.text.embeddings import Provenance as TextEncoder


@dataclass(frozen=True)
class OpenSource:
    """One dataset of the mixture, with its embeddings and latents if the recipe wants any."""

    dataset: Dataset
    embeddings: EmbeddingSet | None = None
    latents: LatentSet | None = None

    def stored_bytes(self, shard: int, row: int) -> int:
        """Of a sample as it is read: media and metadata, or latents."""
        entry = self.dataset.index(shard)[row]
        if self.latents:
            entry = cached_index(self.latents.folder, self.dataset.info.shards[shard].name)[row]
        return sum(int(entry[member]["size"]) for member in ("media", "json", "txt"))


def open_sources(
    config: DataConfig,
    pyramid: Pyramid,
    conditioning: Conditioning,
    latents: CachedLatents | None = None,
) -> list[OpenSource]:
    """The sources of a recipe; refuses those that do not fit it or each other."""
    sources = []
    for number, source in enumerate(config.sources):
        where = f"data.sources.{number}: {source.path}"
        dataset, embeddings, cached = open_dataset(source.path), None, None
        if latents:
            cached = _open_latents(dataset, pyramid, latents, where)
        elif dataset.info.clip:
            try:
                reduction(dataset.info.clip, pyramid.clip_size, dataset.info.kind)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        if isinstance(conditioning, TextConditioning):
            embeddings = _open_embeddings(dataset, conditioning)
        if conditioning.num_classes is not None:
            _refuse_unlabelled(dataset)
        sources.append(OpenSource(dataset, embeddings, cached))
    refuse_other_makers(sources, *makers_of(sources))
    return sources


def makers_of(sources: Sequence[OpenSource]) -> tuple[TextEncoder | None, Autoencoder | None]:
    """What made the embeddings and the latents of the first source, and so of all."""
    embeddings, latents = sources[0].embeddings, sources[0].latents
    encoder = embeddings.info.provenance if embeddings else None
    return encoder, latents.info.provenance if latents else None


def refuse_other_makers(
    sources: Sequence[OpenSource], encoder: TextEncoder | None, autoencoder: Autoencoder | None
) -> None:
    """ConfigError where anything else made embeddings or latents of sources."""
    for source in sources:
        embeddings, latents = source.embeddings, source.latents
        if embeddings and encoder and not embeddings.info.provenance.same_encoder(encoder):
            raise ConfigError(
                f"{embeddings.folder}: does not fit data.sources because another encoder or "
                "tokenizer made it; embed all datasets with one encoder."
            )
        if latents and autoencoder and not latents.info.provenance.same_autoencoder(autoencoder):
            raise ConfigError(
                f"{latents.folder}: does not fit data.sources because another autoencoder, or one "
                "of another normalisation, made it; encode all datasets with one."
            )


def _open_embeddings(dataset: Dataset, conditioning: TextConditioning) -> EmbeddingSet:
    embeddings = open_embeddings(dataset, conditioning.encoder)
    width = embeddings.info.provenance.width
    if width != conditioning.width:
        raise ConfigError(
            f"conditioning.width: value {conditioning.width} is wrong because "
            f"{embeddings.folder} has width {width}; set {width}."
        )
    return embeddings


def _open_latents(
    dataset: Dataset, pyramid: Pyramid, latents: CachedLatents, where: str
) -> LatentSet:
    """Latents of whole clips, or of images, of the recipe's size in pixels."""
    cached = open_latents(dataset, latents.name)
    made, (frames, *sides) = cached.info.provenance, pyramid.clip_size
    if made.channels != latents.channels:
        raise ConfigError(
            f"method.latents.channels: value {latents.channels} is wrong because {cached.folder} "
            f"has {made.channels}; set {made.channels}."
        )
    if made.factors != latents.stride:
        raise ConfigError(
            f"method.latents.stride: value {latents.stride} is wrong because {cached.folder} has "
            f"{made.factors}; set {list(made.factors)}."
        )
    wanted = (1 if dataset.info.kind == "image" else frames, *sides)
    if made.clip != wanted:
        size = "x".join(map(str, wanted))
        raise ConfigError(
            f"{where}: latents of clips of {made.clip} are wrong because the recipe's are {wanted} "
            f"(frames, height, width); encode it with --size {size} under another --name."
        )
    return cached


def _refuse_unlabelled(dataset: Dataset) -> None:
    shard = int(np.argmax(dataset.shard_sizes > 0))
    if "label" not in dataset.read_told(shard, 0)[0]:
        raise ConfigError(
            f"{dataset.path}: does not fit conditioning.kind 'class' because its samples have no "
            "label; build it from captions.jsonl with a label on each line."
        )
