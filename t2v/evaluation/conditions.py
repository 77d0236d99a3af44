"""What a run's clips are to show when they are judged: what the real ones show."""

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.feeding.config import ClassConditioning, Conditioning, TextConditioning
from data_pipeline.shards.dataset import Dataset
from t2v.evaluation.protocol import Protocol
from t2v.sampling.subjects import Request


def request_for(protocol: Protocol, dataset: Dataset, conditioning: Conditioning) -> Request:
    """Clips with classes or captions drawn from the real ones, so as often as there; every level
    that a view looks at."""
    wanted = protocol.generated
    rng = np.random.default_rng([wanted.seed, dataset.info.samples])
    places = dataset.places(rng.integers(0, dataset.info.samples, wanted.clips))
    labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    if isinstance(conditioning, ClassConditioning):
        labels = tuple(label_of(dataset, *place) for place in places)
    elif isinstance(conditioning, TextConditioning):
        prompts = tuple(dataset.read_told(*place)[1].first for place in places)
    return Request(
        prompts=prompts,
        labels=labels,
        count=None if labels or prompts else wanted.clips,
        seed=wanted.seed,
        levels=any(view.level is not None for view in protocol.views),
    )


def label_of(dataset: Dataset, shard: int, row: int) -> int:
    """The class of a clip."""
    label = dataset.read_told(shard, row)[0].get("label")
    if not isinstance(label, int) or isinstance(label, bool):
        raise DataError(
            f"{dataset.path}: sample {row} of shard {shard} has label {label!r}, no class; build a "
            "dataset with labels."
        )
    return label
