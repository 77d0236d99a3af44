"""A dataset's samples as pixels, however they are stored."""

import math

from data_pipeline.errors import DataError
from data_pipeline.media.clips import read_clip
from data_pipeline.media.codec import decode_patches, reduction
from data_pipeline.pyramid import Offsets, Patches, Pyramid, cut_patches
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.tar import Record


def read_patches(
    dataset: Dataset,
    record: Record,
    pyramid: Pyramid,
    offsets: Offsets,
    *,
    deadline_seconds: float = math.inf,
) -> tuple[Patches, float, tuple[float, float]]:
    """Patches, frames per second at the finest level, (height, width) before any resizing."""
    info = dataset.info
    if info.clip is None:
        media = read_clip(
            record.media, info.kind, pyramid.clip_size, deadline_seconds=deadline_seconds
        )
        patches = cut_patches(media.clip, pyramid, offsets)
        return patches, media.fps, (media.original_height, media.original_width)
    patches = decode_patches(
        record.media,
        info.kind,
        stored=info.clip,
        pyramid=pyramid,
        offsets=offsets,
        deadline_seconds=deadline_seconds,
    )
    metadata, by_frames = record.metadata, reduction(info.clip, pyramid.clip_size, info.kind)[0]
    size = _number(metadata, "original_height"), _number(metadata, "original_width")
    return patches, _number(metadata, "fps") / by_frames, size


def _number(metadata: dict, name: str) -> float:
    value = metadata.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise DataError(f"json: {name} {value!r} is no number of at least 0")
    return float(value)
