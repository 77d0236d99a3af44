"""Reading sample number n: from the global order to patches, conditions and metadata."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt16

from data_pipeline.errors import DataError
from data_pipeline.feeding.order import GlobalOrder, Place, keyed_rng
from data_pipeline.media.video import decode_patches, read_clip, reduction
from data_pipeline.pyramid import Offsets, Patches, Pyramid, cut_patches, draw_offsets
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.tar import Record
from data_pipeline.stages import stage
from data_pipeline.store.deadline import within
from data_pipeline.text.embeddings import EmbeddingSet

MAX_ATTEMPTS = 20
GRACE_SECONDS = 5.0  # after the deadline that decoding keeps by itself, unless it is stuck


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture, with its caption embeddings if the recipe wants any."""

    dataset: Dataset
    embeddings: EmbeddingSet | None


@dataclass(frozen=True)
class Sample:
    """One sample of a batch; an image has 0 fps.

    Plain arrays only: they reach the training process through a pipe. Tensors would go through
    shared memory, which containers limit to 64 MiB.
    """

    number: int
    id: str
    patches: Patches
    offsets: Offsets
    fps: float
    original_size: tuple[float, float]
    text: UInt16[np.ndarray, "tokens width"] | None  # the bits of bfloat16
    label: int | None


@dataclass(frozen=True)
class SampleReader:
    """Sample n as a pure function of n; picklable, so that worker processes can hold one."""

    order: GlobalOrder
    sources: Sequence[Source]
    pyramid: Pyramid
    num_classes: int | None
    dropout: float
    deadline_seconds: float

    def read(self, n: int) -> tuple[Sample, list[dict]]:
        """Sample n, and a record of each sample that could not be used in its place."""
        bad: list[dict] = []
        place = self.order.place(n)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self._read(n, place), bad
            except DataError as error:
                bad.append({"n": n, "id": sample_id(self.sources, place), "reason": str(error)})
                place = self.order.replacement(n, attempt)
        raise DataError(
            f"{self.sources[place.source].dataset.path}: sample {n} and {MAX_ATTEMPTS - 1} that "
            f"could replace it are unusable, the last because {bad[-1]['reason']}; "
            "verify the dataset."
        )

    def _read(self, n: int, place: Place) -> Sample:
        source, seed = self.sources[place.source], self.order.seed
        with stage("read"):
            record = source.dataset.read(place.shard, place.row)
        offsets = draw_offsets(self.pyramid, keyed_rng(seed, n, "windows"))
        patches, fps, original_size = within(
            self.deadline_seconds + GRACE_SECONDS,
            lambda: self._patches(source.dataset, record, offsets),
        )
        dropped = bool(keyed_rng(seed, n, "condition").random() < self.dropout)
        text = label = None
        if source.embeddings:
            embeddings = source.embeddings
            with stage("text"):
                tokens = embeddings.null if dropped else embeddings.read(place.shard, place.row)
            text = tokens.view(torch.uint16).numpy()
        if self.num_classes is not None:
            label = self.num_classes if dropped else _label(record.metadata, self.num_classes)
        return Sample(
            n, sample_id(self.sources, place), patches, offsets, fps, original_size, text, label
        )

    def _patches(
        self, dataset: Dataset, record: Record, offsets: Offsets
    ) -> tuple[Patches, float, tuple[float, float]]:
        """Patches, frames per second at the finest level, (height, width) before any resizing."""
        info, pyramid, metadata = dataset.info, self.pyramid, record.metadata
        if info.clip is None:
            media = read_clip(
                record.media, info.kind, pyramid.clip_size, deadline_seconds=self.deadline_seconds
            )
            patches = cut_patches(media.clip, pyramid, offsets)
            return patches, media.fps, (media.original_height, media.original_width)
        patches = decode_patches(
            record.media,
            info.kind,
            stored=info.clip,
            pyramid=pyramid,
            offsets=offsets,
            deadline_seconds=self.deadline_seconds,
        )
        fps = _number(metadata, "fps") / reduction(info.clip, pyramid.clip_size, info.kind)[0]
        size = _number(metadata, "original_height"), _number(metadata, "original_width")
        return patches, fps, size


def sample_id(sources: Sequence[Source], place: Place) -> str:
    """source/shard/row: the source by its number in the recipe."""
    shard = sources[place.source].dataset.info.shards[place.shard].name
    return f"{place.source}/{shard}/{place.row}"


def _label(metadata: dict, num_classes: int) -> int:
    label = metadata.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise DataError(f"json: label {label!r} is none of 0 to {num_classes - 1}")
    return label


def _number(metadata: dict, name: str) -> float:
    value = metadata.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise DataError(f"json: {name} {value!r} is no number of at least 0")
    return float(value)
