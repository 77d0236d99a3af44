"""The global order: which sample is number n, as a pure function of seed, datasets, weights and n.

The mixture is a fixed pattern over the sources, so that every period of it, and so every batch that
is a whole number of periods, holds the exact shares. Within a source each epoch visits every sample
once: shards are permuted and taken in blocks, and the samples of a block are permuted, so that
only a block's shards are in use at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import gcd
from typing import Any

import numpy as np
from jaxtyping import Int64

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Place:
    """Where a sample is."""

    source: int
    shard: int
    row: int


class SourceOrder:
    """The endless sequence of one source's samples: of each shard, those from its first row on."""

    def __init__(
        self,
        fingerprint: str,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        block_shards: int,
        first_rows: Sequence[int] | None = None,
    ):
        self.fingerprint, self.seed, self.block_shards = fingerprint, seed, block_shards
        self.shard_sizes = np.array(shard_sizes, np.int64)
        self.first_rows = [0] * len(shard_sizes) if first_rows is None else list(first_rows)
        self.samples = int(self.shard_sizes.sum())
        self._epochs: dict[int, _Epoch] = {}

    @property
    def digest(self) -> str:
        """Of all that decides the sequence."""
        told = f"{self.seed}/{self.fingerprint}/{self.block_shards}/{self.samples}"
        return sha256(f"{told}/{self.first_rows}".encode()).hexdigest()[:16]

    def place(self, index: int) -> tuple[int, int]:
        """(shard, row) of the sample at an index of the sequence."""
        number, position = divmod(index, self.samples)
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = _Epoch(self, number)
            self._epochs = dict([*self._epochs.items(), (number, epoch)][-4:])
        shard, row = epoch.place(position)
        return shard, self.first_rows[shard] + row


class GlobalOrder:
    """The sequence of samples over all sources, mixed by their weights from sample number `since`
    on, at which each source is at index `starts` of its own sequence."""

    def __init__(
        self,
        seed: int,
        sources: Sequence[SourceOrder],
        weights: Sequence[int],
        *,
        since: int = 0,
        starts: Sequence[int] | None = None,
    ):
        self.seed, self.sources, self.since = seed, sources, since
        self.starts = [0] * len(sources) if starts is None else list(starts)
        self.pattern = mixture_pattern(weights)
        self._turns = [self.pattern[:slot].count(s) for slot, s in enumerate(self.pattern)]
        self._shares = [self.pattern.count(source) for source in range(len(sources))]

    def place(self, n: int) -> Place:
        """Where sample number n is."""
        source, index = self.turn(n)
        return Place(source, *self.sources[source].place(index))

    def replacement(self, n: int, attempt: int) -> Place:
        """The sample that stands in for a bad sample n at the given attempt (from 1): of the same
        source, so that the mixture stays exact."""
        source, _ = self.turn(n)
        rng = keyed_rng(self.seed, n, f"replacement {attempt}")
        index = int(rng.integers(self.sources[source].samples))
        return Place(source, *self.sources[source].place(index))

    def turn(self, n: int) -> tuple[int, int]:
        """(source, index in that source's own sequence) of sample n."""
        period, slot = divmod(n - self.since, len(self.pattern))
        source = self.pattern[slot]
        return source, self.starts[source] + period * self._shares[source] + self._turns[slot]


class _Epoch:
    """One pass over a source."""

    def __init__(self, source: SourceOrder, number: int):
        text = f"{source.seed}/{source.fingerprint}/{number}"
        self.key = int.from_bytes(sha256(text.encode()).digest()[:8], "little")
        shards = np.arange(len(source.shard_sizes), dtype=np.uint64)
        self.shards = np.argsort(_mix(shards + np.uint64(self.key)), kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(source.shard_sizes[self.shards])])
        self.blocks = np.append(self.starts[: -1 : source.block_shards], self.starts[-1])

    def place(self, position: int) -> tuple[int, int]:
        """(shard, row) at a position of the pass."""
        block = _interval(self.blocks, position)
        low, high = int(self.blocks[block]), int(self.blocks[block + 1])
        position = low + permuted(position - low, high - low, self.key + block)
        turn = _interval(self.starts, position)
        return int(self.shards[turn]), position - int(self.starts[turn])


def held_out_rows(
    shard_sizes: Int64[np.ndarray, " shards"], share: float
) -> Int64[np.ndarray, " shards"]:
    """How many samples at the end of each shard training leaves out: together the nearest whole
    number to their share. Neighbours often come of one video, so the split cuts each shard once."""
    return np.diff(np.rint(np.cumsum(shard_sizes) * share), prepend=0).astype(np.int64)


def mixture_pattern(weights: Sequence[int]) -> tuple[int, ...]:
    """Source of each slot of one period: smooth weighted round robin spreads the shares evenly."""
    divisor = gcd(*weights)
    shares = [weight // divisor for weight in weights]
    credit, pattern = [0] * len(shares), []
    for _ in range(sum(shares)):
        credit = [held + share for held, share in zip(credit, shares, strict=True)]
        source = credit.index(max(credit))
        credit[source] -= sum(shares)
        pattern.append(source)
    return tuple(pattern)


def permuted(index: int, size: int, key: int) -> int:
    """Image of an index under the keyed permutation of range(size), in constant time.

    A Feistel network permutes the next even power of two; an image outside the range is permuted
    again until it falls inside.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (_mix(right + _mix(key + turn)) & mask)
        index = left << half | right
        if index < size:
            return index


def keyed_rng(seed: int, n: int, stream: str) -> np.random.Generator:
    """The randomness of sample n for one purpose, whoever asks and when."""
    key = int.from_bytes(sha256(f"{seed}/{stream}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key, counter=n << 128))


def _interval(starts: Int64[np.ndarray, " starts"], position: int) -> int:
    return int(np.searchsorted(starts, position, side="right")) - 1


def _mix(value: Any) -> Any:
    """splitmix64: a well mixed function of 64 bits, of one number or of an array of uint64."""
    value = value + 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31
