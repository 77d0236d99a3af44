"""Measuring many clips: in chunks of a fixed order, shared by processes, each chunk kept for good.

A chunk's key is the digest of its clips' identities and of all that is done to them, so whatever
was measured once is found again, by any number of processes and for any number of clips.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from data_pipeline.errors import NumericError
from data_pipeline.parallel import map_in_order
from data_pipeline.progress import progress
from data_pipeline.shards.dataset import digest_json
from data_pipeline.store import storage
from t2v.engine.world import World
from t2v.evaluation.clips import Clips, Shown
from t2v.evaluation.measures import Measure, Values
from t2v.evaluation.protocol import View

CHUNK_CLIPS = 16


@dataclass(frozen=True)
class Task:
    """What is measured of one set of clips in one view."""

    clips: Clips
    view: View
    codec: str
    measures: Mapping[str, Measure]

    def numbers(self, chunk: int) -> range:
        """The clips of a chunk."""
        low = chunk * CHUNK_CLIPS
        return range(low, min(low + CHUNK_CLIPS, len(self.clips)))

    def key(self, chunk: int, name: str) -> str:
        """All that a chunk's values of a measure follow from, as a digest."""
        view = self.view
        facts = {
            "size": view.size,
            "frames": [view.frames, view.stride, f"{self.clips.rule(view)} {self.clips.seed}"],
            "codec": self.codec,
            "measure": self.measures[name].identity,
            "clips": [self.clips.id(number, view.level) for number in self.numbers(chunk)],
        }
        return digest_json(facts)


def collect(
    task: Task, cache: Path, world: World, *, workers: int, title: str
) -> dict[str, Values]:
    """Each measure's values of all clips in order, the same for any number of processes."""
    chunks = -(-len(task.clips) // CHUNK_CLIPS)
    own = range(world.rank, chunks, world.world_size)
    shares = world.on_all(lambda: dict(measured(task, own, cache, workers, title)))
    every = {chunk: values for share in shares for chunk, values in share.items()}
    return {
        name: np.concatenate([every[chunk][name] for chunk in range(chunks)])
        for name in task.measures
    }


def measured(
    task: Task, chunks: range, cache: Path, workers: int, title: str
) -> Iterator[tuple[int, dict[str, Values]]]:
    """(chunk, values by measure) of some chunks; only what is not kept yet is computed."""
    pending: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        keys = {name: task.key(chunk, name) for name in task.measures}
        known = {name: values for name in keys if (values := kept(cache, keys[name])) is not None}
        if len(known) == len(keys):
            yield chunk, known
        else:
            pending[chunk] = keys
    numbers = [number for chunk in pending for number in task.numbers(chunk)]
    read = partial(read_alone, view=task.view, codec=task.codec)
    alone = (task.clips.only(number) for number in numbers)
    shown = progress(map_in_order(read, alone, workers), title, total=len(numbers))
    for chunk, keys in pending.items():
        clips = [next(shown) for _ in task.numbers(chunk)]
        values = {name: measure(task, name, clips) for name in keys}
        for name, key in keys.items():
            keep(cache, key, values[name])
        yield chunk, values


def read_alone(clips: Clips, view: View, codec: str) -> Shown:
    """The clip of a set that holds no other."""
    return clips.read(0, view, codec)


def measure(task: Task, name: str, clips: list[Shown]) -> Values:
    """A measure of a chunk's clips; NumericError where it is not finite."""
    values = task.measures[name].of(clips)
    if not np.isfinite(values).all():
        raise NumericError(
            f"{task.view.name}: {name} gave values that are not finite; check the network's file "
            "and precision."
        )
    return values


def keep(cache: Path, key: str, values: Values) -> None:
    """Write values beside their digest."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    content = buffer.getvalue()
    storage.write_atomic(str(cache / key[:2] / key), sha256(content).digest() + content)


def kept(cache: Path, key: str) -> Values | None:
    """Values that were kept; None where there are none, or no whole ones."""
    try:
        content = (cache / key[:2] / key).read_bytes()
    except FileNotFoundError:
        return None
    if sha256(content[32:]).digest() != content[:32]:
        return None
    return np.load(io.BytesIO(content[32:]), allow_pickle=False)
