"""Samples that training never sees: of other datasets, or held out of its own."""

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import CachedLatents, Conditioning, DataConfig, Source
from data_pipeline.feeding.order import GlobalOrder, SourceOrder, held_out_rows
from data_pipeline.feeding.sample import SampleReader
from data_pipeline.feeding.sources import OpenSource, open_sources, refuse_other_makers
from data_pipeline.latents.latents import Provenance as Autoencoder
from data_pipeline.pyramid import Pyramid
from data_pipeline.text.embeddings import Provenance as TextEncoder


def held_out_reader(
    config: DataConfig,
    sources: list[Source] | None,
    pyramid: Pyramid,
    conditioning: Conditioning,
    *,
    seed: int,
    samples: int,
    encoder: TextEncoder | None,
    latents: CachedLatents | None = None,
    autoencoder: Autoencoder | None = None,
) -> SampleReader:
    """Reads held-out samples 0 to `samples` - 1, no condition dropped; each is a different one.
    What made their embeddings and latents must be what made those of training."""
    if sources is not None:
        config = config.model_copy(update={"sources": sources})
    opened = open_sources(config, pyramid, conditioning, latents)
    refuse_other_makers(opened, encoder, autoencoder)
    share = 1.0 if sources is not None else config.held_out_share
    orders = [_held_out_order(source, share, seed=seed) for source in opened]
    order = GlobalOrder(seed, orders, [source.weight for source in config.sources])
    for number, source in enumerate(opened):
        needed = sum(order.turn(n)[0] == number for n in range(samples))
        if needed > orders[number].samples:
            raise ConfigError(
                f"held_out.samples: {samples} is wrong because they need {needed} samples of "
                f"{source.dataset.path}, which holds out {orders[number].samples}; lower it, or "
                "hold out more."
            )
    return SampleReader(
        order=order,
        sources=opened,
        pyramid=pyramid,
        num_classes=conditioning.num_classes,
        dropout=0.0,
        deadline_seconds=config.decode_deadline_seconds,
    )


def _held_out_order(source: OpenSource, share: float, *, seed: int) -> SourceOrder:
    sizes = source.dataset.shard_sizes
    held_out = held_out_rows(sizes, share)
    if not held_out.sum():
        raise ConfigError(
            f"data.held_out_share: {share} is wrong because it holds out no sample of "
            f"{source.dataset.path}, which has {sizes.sum()}; raise it."
        )
    return SourceOrder(
        source.dataset.info.fingerprint,
        held_out.tolist(),
        seed=seed,
        block_shards=max(len(sizes), 1),
        first_rows=(sizes - held_out).tolist(),
    )
