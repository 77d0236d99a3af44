"""Which samples form a batch: the plan of any steps, without reading a sample."""

from collections.abc import Iterator

from data_pipeline.feeding.config import DataConfig
from data_pipeline.feeding.loader import global_order
from data_pipeline.feeding.sample import sample_id
from data_pipeline.feeding.sources import OpenSource
from data_pipeline.shards.dataset import open_dataset


def planned_samples(
    config: DataConfig, *, seed: int, global_batch_size: int, step: int, count: int = 1
) -> Iterator[dict]:
    """The samples of `count` steps from `step`, counted as metrics.jsonl does: the first is 1.

    Which of them could not be used, and were replaced, is in the run's `quarantine.jsonl`.
    """
    sources = [OpenSource(open_dataset(source.path)) for source in config.sources]
    order = global_order(sources, config, seed=seed)
    first = (step - 1) * global_batch_size
    for n in range(first, first + count * global_batch_size):
        place = order.place(n)
        dataset = sources[place.source].dataset
        yield {
            "step": n // global_batch_size + 1,
            "n": n,
            "id": sample_id(sources, place),
            "dataset": dataset.path,
            "shard": dataset.info.shards[place.shard].name,
            "row": place.row,
        }
