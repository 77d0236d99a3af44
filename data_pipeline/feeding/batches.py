"""Which samples form a batch: the plan of any steps, without reading a sample."""

from collections.abc import Iterator

from data_pipeline.feeding.config import DataConfig
from data_pipeline.feeding.loader import mixture_of, sequences_of
from data_pipeline.feeding.mixture import Mixture
from data_pipeline.feeding.sample import sample_id
from data_pipeline.feeding.sources import OpenSource
from data_pipeline.shards.dataset import open_dataset


def planned_samples(
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    step: int,
    count: int = 1,
    start: tuple[int, int, Mixture] | None = None,
) -> Iterator[dict]:
    """The samples of `count` steps from `step`, counted as metrics.jsonl does: the first is 1.

    A run whose batches or sources have changed goes on from its `start`: after so many steps it had
    read so many samples of such a mixture. Which samples could not be used, and were replaced, is
    in the run's `quarantine.jsonl`.
    """
    sources = [OpenSource(open_dataset(source.path)) for source in config.sources]
    sequences = sequences_of(sources, config, seed=seed)
    steps, samples, mixture = start or (0, 0, mixture_of(config, sequences))
    order = mixture_of(config, sequences).after(mixture, samples).order(seed, sequences)
    first = samples + (step - 1 - steps) * global_batch_size
    for n in range(first, first + count * global_batch_size):
        place = order.place(n)
        dataset = sources[place.source].dataset
        yield {
            "step": step + (n - first) // global_batch_size,
            "n": n,
            "id": sample_id(sources, place),
            "dataset": dataset.path,
            "shard": dataset.info.shards[place.shard].name,
            "row": place.row,
        }
