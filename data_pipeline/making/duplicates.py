"""Which clips are near-duplicates of earlier ones, by the bits in which their hashes differ."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt8

BANDS = 16
MOST_BITS = BANDS - 1  # so that two hashes that are near have a band in common
AT_ONCE = 1 << 20  # pairs


def originals(hashes: UInt8[np.ndarray, "clips 32"]) -> Int64[np.ndarray, " clips"]:
    """The number of the clip that each one is like: of the first near one that is like no other
    itself, or its own.

    No two originals are near each other, and every duplicate is near its original. Only pairs are
    compared that have one of 16 bands of bits in common, which finds all that are near.
    """
    whole = np.ascontiguousarray(hashes).view(np.dtype((np.void, hashes.shape[1]))).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    turn = np.argsort(first)  # distinct hashes in the order of their first clips
    first, place = first[turn], np.argsort(turn)
    distinct = np.ascontiguousarray(hashes[first])
    near = [pair for band in range(BANDS) for pair in _near_pairs(distinct, band)]
    found = np.arange(len(first))
    if near:
        later, earlier = np.unique(np.concatenate(near), axis=0).T
        for one, other in zip(later.tolist(), earlier.tolist(), strict=True):
            if found[one] == one and found[other] == other:
                found[one] = other
    return first[found[place[inverse]]]


def _near_pairs(hashes: np.ndarray, band: int) -> Iterator[Int64[np.ndarray, "pairs 2"]]:
    """(later, earlier) of near hashes that have a band in common."""
    bands, words = hashes.view(np.uint16)[:, band], hashes.view(np.uint64)
    order = np.argsort(bands, kind="stable")
    sorted_ = bands[order]
    begins, step = np.arange(len(order)), 0
    while len(begins):
        step += 1
        begins = begins[begins + step < len(order)]
        begins = begins[sorted_[begins] == sorted_[begins + step]]
        for at in range(0, len(begins), AT_ONCE):
            some = begins[at : at + AT_ONCE]
            earlier, later = order[some], order[some + step]
            differing = np.bitwise_count(words[earlier] ^ words[later]).sum(1)
            is_near = differing <= MOST_BITS
            if is_near.any():
                yield np.stack([later[is_near], earlier[is_near]], 1)
