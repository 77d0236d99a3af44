"""What is odd about a dataset though nothing of it is damaged."""

from data_pipeline.shards.captions import Captions
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.tar import digest64


def caption_warnings(dataset: Dataset) -> list[str]:
    """That all captions are empty, or that all are alike: a text cannot teach anything then."""
    digests: set[int] = set()
    empty, nothing = 0, digest64(Captions().origin)
    for shard in range(len(dataset.info.shards)):
        column = dataset.index(shard)["caption"]
        empty += int((column == nothing).sum())
        if len(digests) < 2:
            digests.update(column[:1].tolist() + column[column != column[:1]][:1].tolist())
    columns = ", ".join(dataset.info.captions)
    if empty == dataset.info.samples:
        return [
            f"{dataset.path}: all captions are empty: none is in {columns} of a json nor in a txt; "
            "name where they are by --caption-column."
        ]
    told = [f"{dataset.path}: {empty} captions are empty."] if empty else []
    if len(digests) == 1 and dataset.info.samples > 1:
        told.append(f"{dataset.path}: all {dataset.info.samples} captions are alike.")
    return told
