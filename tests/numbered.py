"""Videos whose frames show their numbers, and lists of them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.media.codec import decode_clip, encode_clip
from data_pipeline.shards.dataset import Dataset

BITS = 10
FPS = 24.0
SIZE = {"height": 16, "width": 16 * BITS}


def numbered_clip(frames: int) -> np.ndarray:
    """Ten bars a frame: bar b is white where bit b of the frame's number is 1."""
    bits = (np.arange(frames)[:, None] >> np.arange(BITS)) & 1
    bars = np.repeat(bits * 255, 16, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (frames, 16, 16 * BITS, 3))


def numbered_video(frames: int = 48, fps: float = FPS) -> bytes:
    """A video of frames 0, 1, 2, ..."""
    return encode_clip(numbered_clip(frames), fps)


def numbers_of(media: bytes) -> list[int]:
    """The numbers that the frames of a clip show."""
    bars = decode_clip(media).mean((1, 3)).reshape(-1, BITS, 16)[:, :, 4:12].mean(-1)
    return ((bars > 128) << np.arange(BITS)).sum(-1).tolist()


def clips_of(dataset: Dataset) -> list[tuple[str, int, int]]:
    """(caption, first frame's number, last one's) of every sample."""
    found = []
    for shard, samples in enumerate(dataset.shard_sizes.tolist()):
        for row in range(samples):
            record = dataset.read(shard, row)
            numbers = numbers_of(record.media)
            found.append((record.caption, numbers[0], numbers[-1]))
    return found


def write_csv(path: Path, rows: Sequence[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
