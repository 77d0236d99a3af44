"""A run whose sources or weights change goes on in each source where it was."""

import pytest

from data_pipeline.feeding.mixture import Mixture, Part, told_changes
from data_pipeline.feeding.order import SourceOrder

SIZES = {"a": 7, "b": 5, "c": 4}


def sequence(name: str) -> SourceOrder:
    return SourceOrder(name, [SIZES[name]], seed=3, block_shards=1)


def mixture(**weights: int) -> Mixture:
    parts = (
        Part(path=n, sequence=sequence(n).digest, samples=SIZES[n], weight=weight, start=0)
        for n, weight in weights.items()
    )
    return Mixture(parts=tuple(parts))


# What a run mixes from which sample number on; batches of 12 hold whole periods of all of these.
HISTORY = [
    (0, {"a": 1}),
    (12, {"a": 2, "b": 1}),
    (48, {"b": 1, "a": 2}),
    (60, {"a": 1, "c": 3}),
    (96, {"c": 1, "b": 3}),
    (120, {"a": 1, "b": 1, "c": 1}),
]


def test_every_source_is_gone_through_without_gaps_whatever_changes():
    seen: dict[str, list[int]] = {name: [] for name in SIZES}
    now = mixture(**HISTORY[0][1])
    ends = [start for start, _ in HISTORY[1:]] + [180]
    for (start, weights), end in zip(HISTORY, ends, strict=True):
        now = mixture(**weights).after(now, start)
        order = now.order(3, [sequence(name) for name in weights])
        for n in range(start, end):
            source, index = order.turn(n)
            seen[list(weights)[source]].append(index)
    for name, indexes in seen.items():
        assert indexes == list(range(len(indexes))), name
    assert sum(map(len, seen.values())) == 180


@pytest.mark.parametrize("stops", [(24,), (12, 36), (24, 24, 48)])
def test_resumes_of_the_same_mixture_change_nothing(stops):
    begun = mixture(a=2, b=1).after(mixture(a=1), 12)
    now = begun
    for stop in stops:
        now = mixture(a=2, b=1).after(now, stop)
    assert now == begun
    assert told_changes(begun, now) == []


def test_each_source_is_told_what_becomes_of_it():
    before = mixture(a=2, b=1)
    now = mixture(a=1, c=1).after(before, 30)
    assert told_changes(before, now) == [
        "a: goes on at sample 6 of 7 in its pass 3, nothing repeated or skipped; weight 2 -> 1",
        "c: is new and begins at its first; weight 1",
        "b: is no longer read, after 10 samples",
    ]
    again = mixture(b=1).after(now, 40)
    assert told_changes(now, again)[0] == (
        "b: is read again and goes on at sample 0 of 5 in its pass 3; weight 1"
    )
    (part,) = mixture(a=1).parts
    grown = Mixture(parts=(part.model_copy(update={"sequence": "other"}),))
    told = told_changes(mixture(a=1), grown.after(mixture(a=1), 5))
    assert told[0].startswith("a: has other contents or another split than before")
