"""The global order: a permutation per epoch, an exact mixture, and nothing but its arguments."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.feeding.order import (
    GlobalOrder,
    Place,
    SourceOrder,
    keyed_rng,
    mixture_pattern,
    permuted,
)


def source(
    *shard_sizes: int, seed: int = 0, block_shards: int = 64, name: str = "a"
) -> SourceOrder:
    return SourceOrder(name, shard_sizes, seed=seed, block_shards=block_shards)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 257])
def test_permuted_is_a_permutation(size):
    for key in (0, 1, 2**63):
        assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_permuted_spreads_every_index_evenly():
    images = np.array([[permuted(i, 8, key) for i in range(8)] for key in range(4000)])
    counts = np.stack([np.bincount(column, minlength=8) for column in images.T])
    # 500 expected in each of 64 cells; five standard deviations of a binomial count
    assert abs(counts - 500).max() < 5 * np.sqrt(500 * 7 / 8)


@pytest.mark.parametrize("block_shards", [1, 2, 64])
def test_each_epoch_holds_every_sample_once_in_an_order_of_its_own(block_shards):
    order = source(5, 0, 3, 1, 7, block_shards=block_shards)
    everything = {(shard, row) for shard, size in enumerate([5, 0, 3, 1, 7]) for row in range(size)}
    epochs = [[order.place(16 * epoch + i) for i in range(16)] for epoch in range(6)]
    for epoch in epochs:
        assert len(epoch) == len(everything)
        assert set(epoch) == everything
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_samples_near_in_the_order_come_from_few_shards():
    order = source(*[10] * 40, block_shards=4)
    for epoch in range(3):
        blocks = [
            {order.place(epoch * 400 + block * 40 + i)[0] for i in range(40)} for block in range(10)
        ]
        assert all(len(shards) == 4 for shards in blocks)
        assert not any(a & b for a, b in pairwise(blocks))


@pytest.mark.parametrize("weights", [(1,), (1, 1), (2, 2), (3, 1), (5, 3, 2), (1, 2, 4)])
def test_every_batch_of_whole_periods_holds_the_exact_mixture(weights):
    order = GlobalOrder(0, [source(11, name=str(w)) for w in weights], weights)
    period = len(order.pattern)
    for batch in range(5):
        numbers = range(batch * 2 * period, (batch + 1) * 2 * period)
        counts = Counter(order.place(n).source for n in numbers)
        assert [counts[s] * sum(weights) for s in range(len(weights))] == [
            2 * period * weight for weight in weights
        ]


def test_the_mixture_is_spread_within_a_period():
    pattern = mixture_pattern((1, 1, 2))
    assert pattern == (2, 0, 1, 2)
    assert mixture_pattern((500, 500)) == (0, 1)


def test_a_source_is_gone_through_without_gaps():
    order = GlobalOrder(3, [source(4), source(6, name="b")], (2, 1))
    turns = [order.turn(n) for n in range(60)]
    for number in (0, 1):
        indexes = [index for s, index in turns if s == number]
        assert indexes == list(range(len(indexes)))


def test_order_depends_on_seed_and_fingerprint_only():
    def first(seed: int, name: str) -> list[tuple[int, int]]:
        order = source(50, 50, seed=seed, name=name)
        return [order.place(n) for n in range(20)]

    assert first(0, "a") == first(0, "a")
    assert first(0, "a") != first(1, "a")
    assert first(0, "a") != first(0, "b")


def test_replacement_is_a_function_of_n_and_attempt_and_of_the_same_source():
    order = GlobalOrder(0, [source(30), source(30, name="b")], (1, 1))
    for n in range(20):
        places = [order.replacement(n, attempt) for attempt in range(1, 6)]
        assert places == [order.replacement(n, attempt) for attempt in range(1, 6)]
        assert {place.source for place in places} == {order.place(n).source}
        assert len(set(places)) > 1


def test_keyed_rng_does_not_depend_on_who_asks_when():
    first = {n: keyed_rng(7, n, "windows").random(4).tolist() for n in range(50)}
    again = {n: keyed_rng(7, n, "windows").random(4).tolist() for n in reversed(range(50))}
    assert first == again
    others = [keyed_rng(8, 3, "windows"), keyed_rng(7, 3, "condition"), keyed_rng(7, 4, "windows")]
    assert all(rng.random() != first[3][0] for rng in others)
    draws = np.array([keyed_rng(7, n, "x").random() for n in range(4000)])
    assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * 4000)  # five standard errors


def test_the_order_is_the_one_that_checkpoints_were_written_under():
    """A change here changes what every run in flight would see after its next restart."""
    order = GlobalOrder(17, [source(9, 4, 7, seed=17), source(6, 6, seed=17, name="b")], (2, 1))
    golden = [(0, 1, 2), (1, 0, 3), (0, 2, 3), (0, 2, 0), (1, 1, 3), (1, 1, 3)]
    numbers = (0, 1, 2, 3, 1000, 10**12)
    assert [order.place(n) for n in numbers] == [Place(*place) for place in golden]
