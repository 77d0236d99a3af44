"""What a run's clips are to show when they are judged: what the real ones show."""

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.feeding.config import ClassConditioning, Conditioning, TextConditioning
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.tar import json_caption, parse_metadata, read_member, txt_caption
from data_pipeline.store import storage
from t2v.evaluation.clips import places_of
from t2v.evaluation.protocol import Protocol
from t2v.sampling.subjects import Request


def request_for(
    protocol: Protocol, dataset: Dataset, conditioning: Conditioning, encoder: str | None
) -> Request:
    """Clips with classes or captions drawn from the real ones, so as often as there; every level
    that a view looks at."""
    wanted = protocol.generated
    rng = np.random.default_rng([wanted.seed, dataset.info.samples])
    places = places_of(dataset, rng.integers(0, dataset.info.samples, wanted.clips))
    labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    if isinstance(conditioning, ClassConditioning):
        labels = tuple(label_of(dataset, *place) for place in places)
    elif isinstance(conditioning, TextConditioning):
        prompts = tuple(read_told(dataset, *place)[1] for place in places)
    return Request(
        prompts=prompts,
        labels=labels,
        count=None if labels or prompts else wanted.clips,
        encoder=encoder,
        seed=wanted.seed,
        levels=any(view.level is not None for view in protocol.views),
    )


def label_of(dataset: Dataset, shard: int, row: int) -> int:
    """The class of a clip."""
    label = read_told(dataset, shard, row)[0].get("label")
    if not isinstance(label, int) or isinstance(label, bool):
        raise DataError(
            f"{dataset.path}: sample {row} of shard {shard} has label {label!r}, no class; build a "
            "dataset with labels."
        )
    return label


def read_told(dataset: Dataset, shard: int, row: int) -> tuple[dict, str]:
    """(metadata, caption) of a clip, whose media stay unread."""
    name, members = dataset.info.shards[shard].name, dataset.index(shard)[row]
    path = storage.join(dataset.shard_folder, f"{name}.tar")
    metadata: dict = {}
    if members["json"]["size"]:
        metadata = parse_metadata(path, "the sample", read_member(path, members["json"]))
    caption = json_caption(metadata)
    if not caption and members["txt"]["size"]:
        caption = txt_caption(read_member(path, members["txt"]))
    return metadata, caption
