"""Reading sample number n: from the global order to patches or latents, conditions and metadata."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt16

from data_pipeline.errors import DataError
from data_pipeline.feeding.order import GlobalOrder, Place, keyed_rng
from data_pipeline.feeding.sources import OpenSource
from data_pipeline.pyramid import Offsets, Patches, Pyramid, draw_offsets
from data_pipeline.shards.pixels import read_patches
from data_pipeline.stages import stage
from data_pipeline.store.deadline import within

MAX_ATTEMPTS = 20
GRACE_SECONDS = 5.0  # after the deadline that decoding keeps by itself, unless it is stuck


@dataclass(frozen=True)
class Sample:
    """One sample of a batch; an image has 0 fps.

    Plain arrays only: they reach the training process through a pipe. Tensors would go through
    shared memory, which containers limit to 64 MiB.
    """

    number: int
    id: str
    patches: Patches  # of no level where the recipe reads latents
    offsets: Offsets
    latents: UInt16[np.ndarray, "channels latent_frames latent_height latent_width"] | None
    fps: float
    original_size: tuple[float, float]
    text: UInt16[np.ndarray, "tokens width"] | None  # as latents: the bits of bfloat16
    label: int | None


@dataclass(frozen=True)
class SampleReader:
    """Sample n as a pure function of n; picklable, so that worker processes can hold one."""

    order: GlobalOrder
    sources: Sequence[OpenSource]
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
        offsets, latents = np.zeros((0, 3), np.int64), None
        if source.latents:
            with stage("latents"):
                cached, told = source.latents.read(place.shard, place.row)
            latents = cached.view(torch.uint16).numpy()
            patches = np.zeros((0, *self.pyramid.patch_size, 3), np.uint8)
            fps, original_size = told.fps, (told.original_height, told.original_width)
            metadata = {}
            if self.num_classes is not None:  # media stay unread
                with stage("read"):
                    metadata, _ = source.dataset.read_told(place.shard, place.row)
        else:
            with stage("read"):
                record = source.dataset.read(place.shard, place.row)
            offsets = draw_offsets(self.pyramid, keyed_rng(seed, n, "windows"))
            patches, fps, original_size = within(
                self.deadline_seconds + GRACE_SECONDS,
                lambda: read_patches(
                    source.dataset,
                    record,
                    self.pyramid,
                    offsets,
                    deadline_seconds=self.deadline_seconds,
                ),
            )
            metadata = record.metadata
        dropped = bool(keyed_rng(seed, n, "condition").random() < self.dropout)
        text = label = None
        if source.embeddings:
            embeddings = source.embeddings
            with stage("text"):
                chance = keyed_rng(seed, n, "caption").random()
                tokens = (
                    embeddings.null if dropped else embeddings.read(place.shard, place.row, chance)
                )
            text = tokens.view(torch.uint16).numpy()
        if self.num_classes is not None:
            label = self.num_classes if dropped else _label(metadata, self.num_classes)
        return Sample(
            number=n,
            id=sample_id(self.sources, place),
            patches=patches,
            offsets=offsets,
            latents=latents,
            fps=fps,
            original_size=original_size,
            text=text,
            label=label,
        )


def sample_id(sources: Sequence[OpenSource], place: Place) -> str:
    """source/shard/row: the source by its number in the recipe."""
    shard = sources[place.source].dataset.info.shards[place.shard].name
    return f"{place.source}/{shard}/{place.row}"


def _label(metadata: dict, num_classes: int) -> int:
    label = metadata.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise DataError(f"json: label {label!r} is none of 0 to {num_classes - 1}")
    return label
